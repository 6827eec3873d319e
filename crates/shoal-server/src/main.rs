//! The `shoal` command as a program of its own (the Python package brings its own launcher).

fn main() {}
