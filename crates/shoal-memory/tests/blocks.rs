//! KV blocks copied to the host and back, many at once.

mod common;

use std::sync::Arc;

use common::{PAGE, WAIT, noise, world};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_device::HostBuffer;
use shoal_memory::MemoryError;
use shoal_memory::region::BlockCopy;

const BLOCK: u64 = 48 << 10;

/// Blocks of 48 KiB, some of which reach over two pages, in the host in the opposite order.
fn blocks(host: &Arc<HostBuffer>, count: u64) -> Vec<BlockCopy> {
    let block = |index: u64| BlockCopy {
        offset: ByteCount(index * BLOCK),
        bytes: ByteCount(BLOCK),
        host: Arc::clone(host),
        host_offset: ByteCount((count - 1 - index) * BLOCK),
    };
    (0..count).map(|index| block(index * 37 % count)).collect()
}

#[test]
fn blocks_go_to_the_host_and_come_back_elsewhere() {
    let world = world(64, 64);
    let (one, two) = (world.region("one", 4, LeaseKind::Kv), world.region("two", 4, LeaseKind::Kv));
    one.commit(ByteCount::ZERO, ByteCount(4 * PAGE)).expect("room");
    two.commit(ByteCount::ZERO, ByteCount(4 * PAGE)).expect("room");
    let _guard = world.manager.guard(WAIT).expect("nothing is missing");
    let count = 4 * PAGE / BLOCK;
    let bytes = noise(4 * PAGE, 5);
    one.write(ByteCount::ZERO, &bytes).expect("committed");
    let host = HostBuffer::allocate(&world.device, ByteCount(count * BLOCK)).expect("host memory");

    let stored = one.store_blocks(&blocks(&host, count), None).expect("queued");
    // No waiting in between: the one is behind the other.
    let loaded = two.load_blocks(&blocks(&host, count), Some(&stored)).expect("queued");
    assert!(loaded.wait(WAIT).expect("asked"));
    let mut found = vec![0; bytes.len()];
    two.read(ByteCount::ZERO, &mut found).expect("committed");
    let copied = usize::try_from(count * BLOCK).expect("small");
    assert!(found[..copied] == bytes[..copied], "a block came back wrong");
    assert!(found[copied..].iter().all(|byte| *byte == 0), "more came than was asked for");
    world.check();
}

#[test]
fn what_cannot_be_copied_is_refused_whole() {
    let world = world(64, 64);
    let region = world.region("kv", 4, LeaseKind::Kv);
    region.commit(ByteCount::ZERO, ByteCount(PAGE)).expect("room");
    let _guard = world.manager.guard(WAIT).expect("nothing is missing");
    let host = HostBuffer::allocate(&world.device, ByteCount(PAGE)).expect("host memory");
    let block = |offset: u64, host_offset: u64| BlockCopy {
        offset: ByteCount(offset),
        bytes: ByteCount(BLOCK),
        host: Arc::clone(&host),
        host_offset: ByteCount(host_offset),
    };
    host.write(ByteCount::ZERO, &noise(BLOCK, 3)).expect("nobody uses it");
    let no_memory = region.load_blocks(&[block(0, 0), block(PAGE, 0)], None).expect_err("not committed");
    assert!(matches!(no_memory, MemoryError::State { .. }), "{no_memory}");
    let outside = region.load_blocks(&[block(0, 0), block(4 * PAGE - 1, 0)], None).expect_err("past its end");
    assert!(matches!(outside, MemoryError::OutOfRange { .. }), "{outside}");
    let past_host =
        region.load_blocks(&[block(0, 0), block(0, PAGE - 1)], None).expect_err("past the buffer");
    assert!(matches!(past_host, MemoryError::Device { .. }), "{past_host}");
    let mut found = [1; 64];
    region.read(ByteCount::ZERO, &mut found).expect("committed");
    assert_eq!(found, [0; 64], "a refused list copied something");
    host.access_mut(ByteCount::ZERO, ByteCount(PAGE), |_| ()).expect("a refused list holds nothing");
    assert!(region.store_blocks(&[], None).expect("nothing to do").wait(WAIT).expect("asked"));
}
