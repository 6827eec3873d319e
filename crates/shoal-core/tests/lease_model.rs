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
        1 => model.prop_map(Op::Close),
    ]
}

/// granted by kind, measured correction, closing
type Plain = BTreeMap<u32, ([u64; 3], u64, bool)>;

fn sum(plain: &Plain) -> u64 {
    plain.values().map(|(granted, correction, _)| granted.iter().sum::<u64>() + correction).sum()
}

const BUDGET: u64 = 100;
const HEADROOM: u64 = 15;

fn step(plain: &mut Plain, book: &mut LeaseBook, op: &Op) {
    let free = (BUDGET - HEADROOM).saturating_sub(sum(plain));
    let left = BUDGET - sum(plain);
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
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn the_sum_of_leases_stays_within_the_budget(ops in prop::collection::vec(op(), 1..200)) {
        let mut book = LeaseBook::new(ByteCount(BUDGET), ByteCount(HEADROOM));
        let mut plain = Plain::new();
        for op in &ops {
            step(&mut plain, &mut book, op);
            prop_assert_eq!(book.leased(), ByteCount(sum(&plain)));
            prop_assert!(book.leased() <= book.budget());
            for m in 0..4 {
                let (granted, correction, _) = plain.get(&m).copied().unwrap_or_default();
                prop_assert_eq!(book.held(ModelId(m), LeaseKind::Weights), ByteCount(granted[0]));
                prop_assert_eq!(book.held(ModelId(m), LeaseKind::Overhead), ByteCount(granted[2] + correction));
            }
            book.check_invariants();
        }
    }
}
