//! The ledger against a plain model: a map of numbers, added up anew each time.

use std::collections::BTreeMap;

use proptest::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::ids::ModelId;
use shoal_core::lease::LeaseBook;
use shoal_core::protocol::LeaseKind;

#[derive(Clone, Debug)]
enum Op {
    Open(u32),
    Grant(u32, LeaseKind, u64),
    GiveBack(u32, LeaseKind, u64),
    Measure(u32, u64),
    BeginClosing(u32),
    Close(u32),
    Charge(u64),
    Depart(u32, u32),
    Hold(u32, u64),
    Arrive(u32, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let model = 0..4u32;
    let kind = prop::sample::select(LeaseKind::ALL.to_vec());
    prop_oneof![
        1 => model.clone().prop_map(Op::Open),
        4 => (model.clone(), kind.clone(), 0..60u64).prop_map(|(m, k, b)| Op::Grant(m, k, b)),
        3 => (model.clone(), kind, 0..60u64).prop_map(|(m, k, b)| Op::GiveBack(m, k, b)),
        2 => (model.clone(), 0..60u64).prop_map(|(m, b)| Op::Measure(m, b)),
        1 => model.clone().prop_map(Op::BeginClosing),
        1 => model.clone().prop_map(Op::Close),
        2 => (0..120u64).prop_map(Op::Charge),
        1 => (model, 0..3u32).prop_map(|(m, process)| Op::Depart(m, process)),
        1 => (0..3u32, 0..60u64).prop_map(|(process, b)| Op::Hold(process, b)),
        1 => (0..3u32, prop_oneof![Just(0), 0..60u64]).prop_map(|(process, kept)| Op::Arrive(process, kept)),
    ]
}

/// granted by kind, measured correction, closing
type Plain = BTreeMap<u32, ([u64; 3], u64, bool)>;

/// What others have, and what processes held that are gone.
#[derive(Default)]
struct Beside {
    charged: u64,
    departed: BTreeMap<u32, u64>,
}

fn total((granted, correction, _): &([u64; 3], u64, bool)) -> u64 {
    granted.iter().sum::<u64>() + correction
}

fn sum(plain: &Plain, beside: &Beside) -> u64 {
    plain.values().map(total).sum::<u64>() + beside.departed.values().sum::<u64>()
}

const BUDGET: u64 = 100;
const HEADROOM: u64 = 15;

fn step(plain: &mut Plain, beside: &mut Beside, book: &mut LeaseBook, op: &Op) {
    let free = (BUDGET - HEADROOM).saturating_sub(beside.charged).saturating_sub(sum(plain, beside));
    let left = BUDGET - sum(plain, beside);
    let index = |kind: LeaseKind| LeaseKind::ALL.iter().position(|k| *k == kind).expect("one of all");
    match *op {
        Op::Open(m) => {
            assert_eq!(book.open(ModelId(m)).is_ok(), !plain.contains_key(&m));
            plain.entry(m).or_default();
        }
        Op::Grant(m, kind, bytes) => {
            let covered = match plain.get(&m) {
                Some((_, correction, _)) if kind == LeaseKind::Overhead => bytes.min(*correction),
                _ => 0,
            };
            let fits = plain.get(&m).is_some_and(|(_, _, closing)| !closing) && bytes - covered <= free;
            assert_eq!(book.grant(ModelId(m), kind, ByteCount(bytes)).is_ok(), fits);
            if fits {
                let account = plain.get_mut(&m).expect("just looked");
                account.0[index(kind)] += bytes;
                account.1 -= covered;
            }
        }
        Op::GiveBack(m, kind, bytes) => {
            let held = plain.get(&m).map(|(granted, _, _)| granted[index(kind)]);
            let right = held.is_some_and(|held| bytes <= held);
            assert_eq!(book.give_back(ModelId(m), kind, ByteCount(bytes)).is_ok(), right);
            if right {
                plain.get_mut(&m).expect("just looked").0[index(kind)] -= bytes;
            }
        }
        Op::Measure(m, peak) => {
            let said = book.measure_overhead(ModelId(m), ByteCount(peak)).ok();
            let expected = plain.get_mut(&m).map(|(granted, correction, _)| {
                let wanted = peak.saturating_sub(granted[index(LeaseKind::Overhead)]);
                let got = wanted.min(left + *correction);
                *correction = got;
                ByteCount(wanted - got)
            });
            assert_eq!(said, expected);
        }
        Op::BeginClosing(m) => {
            assert_eq!(book.begin_closing(ModelId(m)).is_ok(), plain.contains_key(&m));
            if let Some(account) = plain.get_mut(&m) {
                account.2 = true;
            }
        }
        Op::Close(m) => {
            let expected = plain
                .remove(&m)
                .map_or(0, |(granted, correction, _)| granted.iter().sum::<u64>() + correction);
            assert_eq!(book.close(ModelId(m)), ByteCount(expected));
        }
        Op::Charge(bytes) => {
            book.charge(ByteCount(bytes));
            beside.charged = bytes.min(BUDGET - HEADROOM);
        }
        Op::Depart(m, process) => {
            let held = plain.remove(&m).as_ref().map_or(0, total);
            assert_eq!(book.depart(ModelId(m), process), ByteCount(held));
            if held > 0 {
                *beside.departed.entry(process).or_default() += held;
            }
        }
        Op::Hold(process, bytes) => {
            let held = bytes.min(left);
            assert_eq!(book.hold(process, ByteCount(bytes)), ByteCount(held));
            if held > 0 {
                *beside.departed.entry(process).or_default() += held;
            }
        }
        Op::Arrive(process, kept) => {
            let held = beside.departed.remove(&process).unwrap_or(0);
            let left = kept.min(held);
            if left > 0 {
                beside.departed.insert(process, left);
            }
            assert_eq!(book.arrive(process, ByteCount(kept)), ByteCount(held - left));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn the_sum_of_leases_stays_within_the_budget(ops in prop::collection::vec(op(), 1..200)) {
        let mut book = LeaseBook::new(ByteCount(BUDGET), ByteCount(HEADROOM));
        let (mut plain, mut beside) = (Plain::new(), Beside::default());
        for op in &ops {
            step(&mut plain, &mut beside, &mut book, op);
            let (leased, leasable) = (sum(&plain, &beside), BUDGET - HEADROOM - beside.charged);
            prop_assert_eq!(book.leased(), ByteCount(leased));
            prop_assert!(book.leased() <= book.budget());
            prop_assert_eq!(book.leasable(), ByteCount(leasable));
            prop_assert_eq!(book.owed(), ByteCount(leased.saturating_sub(leasable).min(beside.charged)));
            let closing: u64 = plain.values().filter(|account| account.2).map(total).sum();
            prop_assert_eq!(book.returning(), ByteCount(closing + beside.departed.values().sum::<u64>()));
            for m in 0..4 {
                let (granted, correction, _) = plain.get(&m).copied().unwrap_or_default();
                prop_assert_eq!(book.held(ModelId(m), LeaseKind::Weights), ByteCount(granted[0]));
                prop_assert_eq!(book.held(ModelId(m), LeaseKind::Overhead), ByteCount(granted[2] + correction));
            }
            book.check_invariants();
        }
    }
}
