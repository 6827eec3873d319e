//! Which blocks to move so that granules become empty and their memory can go back.
//!
//! Apart because it is a plan, worth something only if somebody carries it out: each move is a copy on the device and a
//! number that an engine has to change in its tables. So the emptiest granules are emptied into the fullest, and only
//! those that can be emptied whole.

use super::blocks::BlockPool;

/// One block goes where another is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockMove {
    /// The block that is used.
    pub from: u32,
    /// The free one that shall hold what it holds.
    pub to: u32,
}

/// At most `moves_max` moves, each of which is needed to empty a granule that is emptied by the plan.
#[must_use]
pub fn plan(pool: &BlockPool, moves_max: usize) -> Vec<BlockMove> {
    let granules = pool.by_fill();
    let mut moves = Vec::new();
    // Sources from the emptiest up, targets from the fullest down.
    let mut last = granules.len();
    let mut open: Vec<u32> = Vec::new();
    for (place, source) in granules.iter().enumerate() {
        if place >= last {
            break;
        }
        let needed = source.used as usize;
        if moves.len() + needed > moves_max {
            break;
        }
        // What reaches into it from before would still keep it.
        if source.is_pinned {
            continue;
        }
        while open.len() < needed && last > place + 1 {
            last -= 1;
            // A block that reaches into the next granule would keep that one.
            let targets = pool.free_in(granules[last].slot);
            open.extend(targets.into_iter().filter(|block| !pool.reaches_over(*block)).rev());
        }
        if open.len() < needed {
            break;
        }
        let targets = open.split_off(open.len() - needed);
        let pairs = pool.used_in(source.slot).into_iter().zip(targets.into_iter().rev());
        moves.extend(pairs.map(|(from, to)| BlockMove { from, to }));
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::super::blocks::BlockPool;
    use super::super::layout::{BlockShape, CacheLayout, CacheSpec, GroupSpec, PlaneOrder};
    use super::*;
    use crate::bytes::ByteCount;

    /// Granules of one unit with 4 blocks each.
    fn pool(granules: u32) -> BlockPool {
        let group = GroupSpec {
            name: "full".to_owned(),
            layers: 1,
            shape: BlockShape::Latent { tokens: 16, dim: 16 << 10 },
            element_bytes: 2,
        };
        let spec = CacheSpec {
            groups: vec![group],
            order: PlaneOrder::BlockMajor,
            bytes: ByteCount::mib(u64::from(granules) * 2),
            granule_bytes_max: ByteCount::mib(2),
        };
        let mut pool = BlockPool::new(&CacheLayout::new(&spec).expect("a layout").groups()[0]);
        for unit in 0..granules {
            let slot = pool.coming(unit, 1).expect("open");
            pool.mapped(slot).expect("coming");
        }
        pool
    }

    #[test]
    fn the_emptiest_move_into_the_fullest() {
        let mut pool = pool(4);
        let mut ids = [0_u32; 16];
        assert!(pool.alloc(&mut ids));
        let keep = [0_u32, 1, 2, 4, 8, 9];
        let free: Vec<u32> = ids.into_iter().filter(|id| !keep.contains(id)).collect();
        pool.free(&free, |_| ()).expect("owned");
        let moves = plan(&pool, 100);
        let froms: Vec<u32> = moves.iter().map(|planned| planned.from).collect();
        let tos: Vec<u32> = moves.iter().map(|planned| planned.to).collect();
        assert_eq!(froms, [4], "granule 1 fits into granule 0; granule 2 would fit nowhere");
        assert_eq!(tos, [3]);
        assert_eq!(plan(&pool, 0), []);
    }

    #[test]
    fn carried_out_it_leaves_as_few_granules_as_can_be() {
        let mut pool = pool(16);
        let mut ids = [0_u32; 64];
        assert!(pool.alloc(&mut ids));
        let free: Vec<u32> = ids.into_iter().filter(|id| id % 4 != id / 4 % 4).collect();
        pool.free(&free, |_| ()).expect("owned");
        assert_eq!(pool.figures().units_empty, 0);
        for planned in plan(&pool, 100) {
            pool.share(planned.from).expect("owned");
            pool.take(planned.to).expect("free");
            pool.renumber(planned.from, planned.to).expect("taken for it");
            pool.free(&[planned.to], |_| ()).expect("owned");
        }
        pool.check_invariants().expect("figures");
        assert_eq!((pool.figures().owned, pool.figures().units_empty), (16, 12));
    }
}
