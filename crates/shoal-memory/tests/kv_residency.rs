//! KV blocks whose contents a reclaim moved to the host: what is promised fits together.

mod common;

use common::{PAGE, WAIT, world};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use shoal_memory::KvBacking;

const ALL: ByteCount = ByteCount(u64::MAX);

#[test]
fn new_blocks_are_refused_where_old_ones_could_not_come_back() {
    let world = world(8, 64);
    let region = world.region("kv", 8, LeaseKind::Kv);
    let kv = KvBacking::new(&region, ByteCount(PAGE), 8).expect("fits");
    assert!(kv.back(&[0, 1, 2]).expect("ids"));
    region.write(ByteCount(2 * PAGE), b"kept").expect("backed");
    world.manager.reclaim(ALL, WAIT, "a test").expect("no step runs");
    assert!(!kv.back(&[3, 4]).expect("ids"), "five pages on a budget of four");
    assert_eq!((kv.live_bytes(), world.device_used()), (ByteCount(3 * PAGE), ByteCount::ZERO));
    world.check();
    assert!(kv.back(&[5]).expect("ids"), "four on four");
    assert!(region.missing_bytes().is_zero(), "all of it together");
    world.check();
    let _guard = world.manager.guard(WAIT).expect("what was promised is there");
    let mut read = [0; 4];
    region.read(ByteCount(2 * PAGE), &mut read).expect("back");
    assert_eq!(&read, b"kept");
}

#[test]
fn blocks_taken_away_while_on_the_host_are_not_brought_back() {
    let world = world(8, 64);
    let region = world.region("kv", 8, LeaseKind::Kv);
    let kv = KvBacking::new(&region, ByteCount(PAGE), 8).expect("fits");
    assert!(kv.back(&[0]).expect("ids") && kv.back(&[2]).expect("ids") && kv.back(&[5]).expect("ids"));
    region.write(ByteCount(5 * PAGE), b"kept").expect("backed");
    region.write(ByteCount(0), b"gone").expect("backed");
    world.manager.reclaim(ALL, WAIT, "a test").expect("no step runs");
    // Somebody else has taken all but one page meanwhile.
    world
        .manager
        .lease()
        .acquire(LeaseKind::Overhead, ByteCount(3 * PAGE), ByteCount(3 * PAGE), WAIT, "")
        .expect("free");
    assert!(world.manager.guard(std::time::Duration::from_millis(100)).is_err());
    kv.unback(&[0, 2]).expect("backed");
    assert_eq!(region.usage().host, ByteCount(PAGE), "their copies are dropped");
    assert_eq!(kv.backed_bytes(), ByteCount(PAGE));
    {
        let _guard = world.manager.guard(WAIT).expect("preempting made room");
        let mut read = [0; 4];
        region.read(ByteCount(5 * PAGE), &mut read).expect("back");
        assert_eq!(&read, b"kept");
    }
    world.manager.lease().give_back(LeaseKind::Overhead, ByteCount(3 * PAGE));
    assert!(kv.back(&[0]).expect("ids"));
    let mut read = [1; 4];
    region.read(ByteCount::ZERO, &mut read).expect("backed");
    assert_eq!(read, [0; 4], "a block backed anew is zero");
    world.check();
}
