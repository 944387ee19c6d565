"""The edge of qfunc, the only impure code: tracing in, running, materializing out."""
