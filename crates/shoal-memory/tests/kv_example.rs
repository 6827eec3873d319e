//! The example of KV blocks runs.

#[path = "../examples/kv_blocks.rs"]
mod example;

#[test]
fn the_example_of_kv_blocks_runs() {
    example::main().expect("as it says");
}
