//! The `shoal` command as a program of its own (the Python package brings its own launcher).

use std::process::ExitCode;

fn main() -> ExitCode {
    let code = shoal_server::cli::run(std::env::args().collect());
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
