"""The only impure code: between torch's mutable modules and qfunc's values."""
