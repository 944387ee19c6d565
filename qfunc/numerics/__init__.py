"""Math on tensors: qparams, affine maps, observers, and the limits of integer kernels."""
