//! (the gateway's bench comes with the gateway)

fn main() {}
