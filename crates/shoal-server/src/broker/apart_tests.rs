//! Models that are set apart while both are on the device, on the core alone.

use std::path::PathBuf;
use std::sync::Arc;

use shoal_core::bytes::ByteCount;
use shoal_core::ids::ModelId;
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerCapabilities, WorkerHolds, WorkerUsage};
use tokio::sync::mpsc;

use super::histories::config;
use super::{Core, Timing};
use crate::supervisor::Entry;

const WEIGHTS: ByteCount = ByteCount::mib(40);
const OVERHEAD: ByteCount = ByteCount::mib(2);

fn pid_of(place: usize) -> u32 {
    100 + u32::try_from(place).expect("few")
}

/// A server whose first two models had workers before it, which have not spoken yet.
fn core() -> Core {
    let mut core = Core::new(Arc::new(config(0)), Timing::default(), 1_000_000, None);
    for place in [0, 1] {
        let entry = Entry {
            model: format!("m{place}"),
            pid: pid_of(place),
            start: 1,
            socket: PathBuf::from(format!("/none/{place}.sock")),
            fingerprint: String::new(),
            log: PathBuf::from("/none"),
            log_from: 0,
            starts: 1,
            at_ms: 0,
        };
        core.expect_worker(place, &entry, 0);
    }
    core.handle_timer(0);
    core
}

/// It says that it has all its weights.
fn speaks(core: &mut Core, place: usize, now_ms: u64) -> mpsc::Receiver<FromServer> {
    let (sender, heard) = mpsc::channel(64);
    let holds = WorkerHolds {
        weights: WEIGHTS,
        overhead: OVERHEAD,
        capabilities: Some(WorkerCapabilities { weights_bytes: WEIGHTS, ..WorkerCapabilities::default() }),
        usage: WorkerUsage {
            weights_device: WEIGHTS,
            weights_total: WEIGHTS,
            overhead_device: OVERHEAD,
            ..WorkerUsage::default()
        },
        ..WorkerHolds::default()
    };
    core.handle_greeted(&format!("m{place}"), pid_of(place), sender, Some(&holds), now_ms)
        .expect("it is awaited");
    heard
}

fn set_apart(core: &mut Core, now_ms: u64) {
    let mut file = config(0);
    (file.models[0].apart, file.models[1].apart) = (vec!["m1".to_owned()], vec!["m0".to_owned()]);
    core.handle_reload(file, &[], now_ms);
}

/// What it is told to give up: orders and bytes.
fn reclaims(heard: &mut mpsc::Receiver<FromServer>) -> Vec<(u64, ByteCount)> {
    let told = std::iter::from_fn(|| heard.try_recv().ok());
    told.filter_map(|said| match said {
        FromServer::Reclaim { order, bytes, .. } => Some((order, bytes)),
        _ => None,
    })
    .collect()
}

/// Nobody asks for anything: they stood side by side until somebody did, perhaps for ever.
#[test]
fn models_that_are_set_apart_part_by_themselves_whenever_their_workers_said_what_they_hold() {
    for is_before in [false, true] {
        let mut core = core();
        if is_before {
            set_apart(&mut core, 10);
        }
        let mut heard = [speaks(&mut core, 0, 20), speaks(&mut core, 1, 30)];
        if !is_before {
            set_apart(&mut core, 40);
        }
        let told = heard.each_mut().map(reclaims);
        let [leaves, stays] = if told[0].is_empty() { [1, 0] } else { [0, 1] };
        let [(order, bytes)] = told[leaves][..] else { panic!("one is to leave: {told:?}") };
        assert_eq!((bytes, &told[stays][..]), (WEIGHTS, &[][..]), "all of one and nothing of the other");
        let say = |core: &mut Core, message| core.handle_message(leaves, pid_of(leaves), message, 50);
        say(&mut core, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes });
        let (copied, duration_us, error) = (ByteCount::ZERO, 1, None);
        say(&mut core, FromWorker::OrderDone { order, bytes, copied, duration_us, error });
        core.handle_timer(100);
        assert_eq!(heard.each_mut().map(reclaims), [vec![], vec![]], "then there is peace");
        let held = [leaves, stays].map(|place| {
            let id = ModelId(u32::try_from(place).expect("few"));
            core.book.held(id, LeaseKind::Weights)
        });
        assert_eq!(held, [ByteCount::ZERO, WEIGHTS]);
    }
}
