use proptest::prelude::*;

use super::*;

const MIB: fn(u64) -> ByteCount = ByteCount::mib;

fn reading(total: u64, free: u64) -> Reading {
    Reading { total: MIB(total), free: MIB(free), processes: Vec::new() }
}

fn holder(leased: u64, said: u64, seen: Option<u64>) -> Holder {
    Holder { leased: MIB(leased), said: MIB(said), seen: seen.map(MIB) }
}

#[test]
fn what_others_have_comes_off_and_what_is_leased_and_there_does_not() {
    // 100 in all, 10 of them headroom: two holders with 30 each, others with 20.
    let two = [holder(30, 30, Some(30)), holder(30, 30, Some(30))];
    let found = compare(&reading(100, 20), MIB(90), MIB(10), two);
    assert_eq!((found.ours, found.others, found.drift, found.taken), (MIB(60), MIB(20), MIB(0), MIB(20)));
    assert!(found.is_by_process);
    // The same with nobody else: all of the budget can be leased.
    assert_eq!(compare(&reading(100, 40), MIB(90), MIB(10), two).taken, MIB(0));
}

#[test]
fn what_goes_beyond_leases_is_taken_from_headroom_first() {
    let over = |beyond: u64| {
        let one = [holder(30, 30, Some(30 + beyond))];
        compare(&reading(100, 70 - beyond), MIB(90), MIB(10), one)
    };
    assert_eq!((over(8).drift, over(8).taken), (MIB(8), MIB(0)));
    assert_eq!((over(10).drift, over(10).taken), (MIB(10), MIB(0)));
    assert_eq!((over(16).drift, over(16).taken), (MIB(16), MIB(6)));
}

#[test]
fn what_is_leased_and_not_there_yet_changes_nothing() {
    let found = compare(&reading(100, 100), MIB(90), MIB(10), [holder(60, 0, Some(0))]);
    assert_eq!((found.taken, found.others, found.ours), (MIB(0), MIB(0), MIB(0)));
}

#[test]
fn where_processes_are_hidden_their_own_word_counts() {
    for seen in [None, Some(0)] {
        let found = compare(&reading(100, 20), MIB(90), MIB(10), [holder(60, 60, seen)]);
        assert_eq!((found.ours, found.others, found.taken), (MIB(60), MIB(20), MIB(20)));
        assert!(!found.is_by_process, "{seen:?}");
    }
}

#[test]
fn a_dead_holders_bytes_are_back_once_others_have_no_more_than_before() {
    let others = |mib| Comparison { others: MIB(mib), ..Comparison::default() };
    assert!(!is_back(&others(54), MIB(30), MIB(24)));
    assert!(!is_back(&others(40), MIB(30), MIB(24)));
    assert!(is_back(&others(33), MIB(30), MIB(24)) && is_back(&others(3), MIB(30), MIB(24)));
}

#[test]
fn numbers_of_drivers_and_workers_may_be_anything() {
    let all = Holder { leased: ByteCount(u64::MAX), said: ByteCount(u64::MAX), seen: None };
    let strange = Reading { total: MIB(1), free: ByteCount(u64::MAX), processes: vec![] };
    let found = compare(&strange, ByteCount(u64::MAX), ByteCount(u64::MAX), [all, all]);
    assert!(found.taken <= ByteCount(u64::MAX));
    assert_eq!(compare(&Reading::default(), ByteCount(u64::MAX), MIB(0), []).taken, ByteCount(u64::MAX));
}

#[test]
fn one_reading_alone_moves_nothing() {
    let (mut charge, tolerance) = (Charge::default(), MIB(2));
    let notes = |charge: &mut Charge, mibs: &[u64]| -> Vec<Option<u64>> {
        mibs.iter().map(|mib| charge.note(MIB(*mib), tolerance).map(|taken| taken.0 >> 20)).collect()
    };
    assert_eq!(notes(&mut charge, &[0, 20, 0, 0]), [None; 4]);
    assert_eq!(notes(&mut charge, &[20]), [None]);
    assert!(charge.is_unsure(tolerance));
    assert_eq!(notes(&mut charge, &[22]), [Some(20)], "two agree on 20");
    assert_eq!(notes(&mut charge, &[21, 19, 20, 21]), [None; 4], "too little to act on");
    assert_eq!(notes(&mut charge, &[8, 30, 8, 8]), [None; 4]);
    assert_eq!(notes(&mut charge, &[8]), [Some(8)], "three agree");
    assert_eq!(notes(&mut charge, &[0, 1, 0]), [None, None, Some(1)]);
    assert_eq!(
        notes(&mut charge, &[0, 0, 0]),
        [None, Some(0), None],
        "nothing is nothing, however little it was"
    );
    assert_eq!((charge.taken(), charge.is_unsure(tolerance)), (MIB(0), false));
}

/// A device of plain numbers: others, holders with leases and with what they have.
#[derive(Clone, Debug)]
struct World {
    total: u64,
    headroom: u64,
    budget: u64,
    others: u64,
    /// Leased and there.
    holders: Vec<(u64, u64)>,
}

fn world() -> impl Strategy<Value = World> {
    (0..300u64, 0..60u64, 0..400u64, 0..100u64, prop::collection::vec((0..60u64, 0..60u64), 0..6)).prop_map(
        |(spare, headroom, budget, others, holders)| {
            let there: u64 = holders.iter().map(|(_, there)| there).sum();
            World { total: there + others + spare, headroom, budget, others, holders }
        },
    )
}

proptest! {
    /// Whatever is granted up to what the comparison leaves can be mapped by all holders at the same time, with others
    /// having what they have, and then as much is free as is to stay free; and it takes no page more than that.
    #[test]
    fn what_is_left_can_be_had(world in world(), grants in prop::collection::vec(0..100u64, 6)) {
        let there: u64 = world.holders.iter().map(|(_, there)| there).sum();
        let free = world.total - there - world.others;
        let of = |(leased, there): &(u64, u64)| holder(*leased, *there, Some(*there));
        let found = compare(&reading(world.total, free), MIB(world.budget), MIB(world.headroom), world.holders.iter().map(of));
        prop_assert_eq!(found.others, MIB(world.others));
        prop_assert_eq!(found.ours, MIB(there));
        let leasable = world.budget - (found.taken.0 >> 20);
        let beyond: u64 = world.holders.iter().map(|(leased, there)| there.saturating_sub(*leased)).sum();
        prop_assert_eq!(found.drift, MIB(beyond));
        let keep = world.headroom.saturating_sub(beyond);
        let mut leases: Vec<u64> = world.holders.iter().map(|(leased, _)| *leased).collect();
        let fits = |leases: &[u64]| {
            let mapped: u64 =
                world.holders.iter().zip(leases).map(|((leased, there), lease)| lease.max(leased) + there.saturating_sub(*leased)).sum();
            world.others + mapped + keep <= world.total
        };
        let within: u64 = world.holders.iter().map(|(leased, there)| leased.min(there)).sum();
        // Where not even the headroom is there, nothing can be left.
        prop_assert!(keep <= free + within || leasable == 0);
        if leases.iter().sum::<u64>() <= leasable && keep <= free + within {
            prop_assert!(fits(&leases));
            for (lease, grant) in leases.iter_mut().zip(&grants) {
                let left = leasable - world.holders.iter().map(|(leased, _)| leased).sum::<u64>();
                *lease += (*grant).min(left / world.holders.len() as u64);
            }
            prop_assert!(leases.iter().sum::<u64>() <= leasable && fits(&leases), "{leases:?} of {leasable}");
            // Of all that it leaves, a page more would not fit, unless nothing was taken.
            if !found.taken.is_zero() && !leases.is_empty() {
                let most: u64 = leases.iter().sum();
                leases[0] += leasable - most + 2;
                prop_assert!(!fits(&leases), "{leases:?} would fit as well");
            }
        }
    }

    /// What comes off follows what is found, never beyond it, and comes to rest within the tolerance.
    #[test]
    fn a_charge_is_what_readings_agree_on(founds in prop::collection::vec(0..50u64, 1..60), last in 0..50u64) {
        let (mut charge, tolerance) = (Charge::default(), MIB(3));
        let mut seen: Vec<u64> = Vec::new();
        for found in founds {
            seen.push(found);
            let before = charge.taken();
            let newest: Vec<u64> = seen.iter().rev().take(3).copied().collect();
            if let Some(taken) = charge.note(MIB(found), tolerance) {
                    prop_assert_eq!(taken, charge.taken());
                    prop_assert!(taken != before);
                    prop_assert!(newest.contains(&(taken.0 >> 20)), "{taken} of {newest:?}");
                    let moved = taken.saturating_sub(before).max(before.saturating_sub(taken));
                    prop_assert!(moved >= tolerance || taken.is_zero());
                    prop_assert!(taken < before || newest[..2].iter().all(|found| MIB(*found) >= taken));
                    prop_assert!(taken > before || newest.iter().all(|found| MIB(*found) <= taken));
            } else {
                prop_assert_eq!(before, charge.taken());
            }
        }
        for _ in 0..3 {
            charge.note(MIB(last), tolerance);
        }
        let off = charge.taken().saturating_sub(MIB(last)).max(MIB(last).saturating_sub(charge.taken()));
        prop_assert!(off < tolerance && (last > 0 || charge.taken().is_zero()));
        prop_assert!(!charge.is_unsure(tolerance));
    }
}

/// While a dead process's memory may hide what others take, what is charged does not fall; once that shows, it counts at once.
#[test]
fn a_charge_does_not_fall_by_readings_that_cannot_show_it_and_rises_at_once_when_one_can() {
    let (mut charge, tolerance) = (Charge::default(), MIB(3));
    assert_eq!((charge.note(MIB(10), tolerance), charge.note(MIB(10), tolerance)), (None, Some(MIB(10))));
    for _ in 0..5 {
        assert_eq!(charge.note_at_least(MIB(0), tolerance), None);
    }
    assert!(!charge.is_unsure(tolerance));
    assert_eq!(charge.note_at_least(MIB(20), tolerance), None, "as any reading, only with a second one");
    assert_eq!(charge.note_at_least(MIB(20), tolerance), Some(MIB(20)));
    assert_eq!((charge.reveal(MIB(90), MIB(15), tolerance), charge.taken()), (Some(MIB(35)), MIB(35)));
    assert_eq!(
        (charge.reveal(MIB(5), MIB(15), tolerance), charge.taken()),
        (None, MIB(35)),
        "less is for readings to agree on"
    );
    assert_eq!((charge.note(MIB(5), tolerance), charge.note(MIB(5), tolerance)), (None, Some(MIB(5))));
}
