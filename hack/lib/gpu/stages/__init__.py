"""The stages of a run. Each is a function with a `Machine` and the `Results` of its stage."""
