"""Quantize PyTorch models for CPUs with pure functions over immutable graphs.

    trace -> fuse -> prepare -> calibrate -> convert -> lower -> materialize
    trace -> fuse(qat=True) -> prepare_qat -> materialize, train, absorb -> convert -> lower -> materialize

Every function returns a `returns.result.Result`: `Success(stage)` or `Failure(error)`; `unwrap` turns it into the stage
or an exception. `quantize` is the whole way in one call.

How it is built. A module imports only from those before it in this list; all but `edge` is pure:

- `errors`, `result`: the closed union of errors, and `R`;
- `numerics`: the mathematics on tensors: qparams, observers, folding, saturation;
- `ir`: the immutable graph; `ops`: the vocabulary of operators; `match`: patterns; `params`: parameter expressions;
- `config`: configurations as values; `backends`: what can be quantized; `engines`: the kernels, as tables;
- `passes`: one verb a file; `edge`: tracing in, running, materializing out, the kernels' modules, the host's report;
- `artifact`: values as files, and back;
- `testing`: random models and configurations, the laws as values, the oracle.

A node's id names the value it computes, so that a fused node has the id of the last node of its chain. A graph holds
names of source tensors, which are read at materialization and refused if they changed since; a materialized module
shares their memory until either side writes (copy on write).
"""

from qfunc.artifact import load, save
from qfunc.backends import (
    CPU,
    EXECUTORCH,
    FBGEMM,
    NATIVE,
    ONEDNN,
    QNNPACK,
    TENSORRT,
    X86,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from qfunc.config.annotation import Annotations, Derived, SharedWith, Unshared, combine
from qfunc.config.as_json import from_json, read_certificate, read_host_report, to_json
from qfunc.config.backend_config import BackendConfig, Observation, OperatorConfig
from qfunc.config.certificate import Certificate, Entry
from qfunc.config.certificate_diff import CertificateDiff
from qfunc.config.custom_config import CustomConfig, CustomModule, Standalone
from qfunc.config.custom_fusion import CustomFusion
from qfunc.config.dtype_config import DTypeConfig, DTypeWithConstraints
from qfunc.config.host_report import HostReport, Verdict
from qfunc.config.kernel import KernelRow
from qfunc.config.point import Edge
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.selectors import depthwise_convolutions, first_layer, last_layer, layers
from qfunc.config.training import for_training
from qfunc.edge.absorb import absorb
from qfunc.edge.attention import decomposed_attention
from qfunc.edge.calibrate import calibrate
from qfunc.edge.distributed import calibrate_distributed
from qfunc.edge.fuse_modules import fuse_modules, fuse_modules_qat
from qfunc.edge.fusers import fuse_known_modules
from qfunc.edge.host import check_host, check_kernels
from qfunc.edge.interpret import interpret
from qfunc.edge.materialize import materialize
from qfunc.edge.recurrent import QUANTIZABLE_LSTM, observed_lstm, quantized_lstm
from qfunc.edge.reuse import reuse
from qfunc.edge.sharded import calibrate_sharded
from qfunc.edge.ship import pack, unpack
from qfunc.edge.switch import Schedule, Switches, switch, switched
from qfunc.edge.trace import trace
from qfunc.engines.own import Trial, own_kernel
from qfunc.errors import QuantError, kept, render
from qfunc.match import MatchAllNode, Pattern, Step
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import (
    FixedQParams,
    Histogram,
    MinMax,
    MovingAverageMinMax,
    MovingAveragePerChannelMinMax,
    Observer,
    PerChannelMinMax,
)
from qfunc.numerics.qparams import QParams, QuantSpec
from qfunc.numerics.recording import Recording
from qfunc.numerics.search_observers import Entropy, MeanSquaredError, Percentile
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, ReuseInput
from qfunc.passes.annotate import annotate
from qfunc.passes.convert import convert
from qfunc.passes.describe import Comparison, Description, compare, describe
from qfunc.passes.explain import FusionReport, explain_fusion
from qfunc.passes.lower import Lowered
from qfunc.passes.prepare import prepare
from qfunc.passes.prepare_qat import prepare_qat
from qfunc.passes.stages import Calibrated, Converted, Prepared
from qfunc.passes.statistics import Statistics, merge
from qfunc.quantize import fuse, lower, quantize
from qfunc.result import QuantException, R, unwrap

__all__ = [
    "CPU",
    "EXECUTORCH",
    "FBGEMM",
    "NATIVE",
    "ONEDNN",
    "QNNPACK",
    "QUANTIZABLE_LSTM",
    "TENSORRT",
    "X86",
    "Annotations",
    "BackendConfig",
    "Calibrated",
    "Cast",
    "Certificate",
    "CertificateDiff",
    "Comparison",
    "Converted",
    "CustomConfig",
    "CustomFusion",
    "CustomModule",
    "DTypeConfig",
    "DTypeWithConstraints",
    "Derived",
    "Description",
    "Dynamic",
    "Edge",
    "Entropy",
    "Entry",
    "FakeQuantize",
    "FixedQParams",
    "FusionReport",
    "Histogram",
    "HostReport",
    "KeepFloat",
    "KernelRow",
    "Lowered",
    "MatchAllNode",
    "MeanSquaredError",
    "MinMax",
    "MovingAverageMinMax",
    "MovingAveragePerChannelMinMax",
    "Observation",
    "Observer",
    "OperatorConfig",
    "Pattern",
    "PerChannelMinMax",
    "Percentile",
    "Prepared",
    "QConfig",
    "QConfigMapping",
    "QParams",
    "QuantError",
    "QuantException",
    "QuantSpec",
    "R",
    "Recording",
    "ReuseInput",
    "Schedule",
    "SharedWith",
    "Standalone",
    "Statistics",
    "Step",
    "Switches",
    "Trial",
    "Unshared",
    "Verdict",
    "absorb",
    "annotate",
    "calibrate",
    "calibrate_distributed",
    "calibrate_sharded",
    "check_host",
    "check_kernels",
    "combine",
    "compare",
    "convert",
    "decomposed_attention",
    "depthwise_convolutions",
    "describe",
    "explain_fusion",
    "first_layer",
    "for_training",
    "from_json",
    "fuse",
    "fuse_known_modules",
    "fuse_modules",
    "fuse_modules_qat",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig_mapping",
    "interpret",
    "kept",
    "last_layer",
    "layers",
    "load",
    "lower",
    "materialize",
    "merge",
    "observed_lstm",
    "own_kernel",
    "pack",
    "prepare",
    "prepare_qat",
    "quantize",
    "quantized_lstm",
    "read_certificate",
    "read_host_report",
    "render",
    "reuse",
    "save",
    "switch",
    "switched",
    "to_json",
    "trace",
    "unpack",
    "unwrap",
]
