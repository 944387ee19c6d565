"""Leaf modules that compute on quantized values.

Engine `"onednn"` (`affine`, `conv`, `linear`, `pool`, `arithmetic`) works on plain `uint8`/`int8` tensors; engine
`"quantized"` (`quantized`) on torch's quantized tensors. `contract` says what each must compute.
"""
