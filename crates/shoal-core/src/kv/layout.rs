//! Where the blocks of a cache lie: its groups, its planes, and the strides that tensors over it have.
//!
//! Apart because it is arithmetic that never changes once a cache is made, and because engines ask for it before any
//! memory exists.
//!
//! A *group* is the layers that share block ids (all full-attention layers, say). It has its own addresses, one after
//! the other group's. Block-major, the group is one *plane* in which a block's layers lie side by side; layer-major, it
//! is one plane a layer. Block `b` begins at `b * piece_bytes` of each plane, whatever number that is: blocks may straddle
//! pages and extents. Memory comes and goes by *granules*: a power-of-two run of pages at the same place of every plane,
//! one extent in each. The shortest granule of a group is its *unit*; a piece is never longer, so it touches at most two
//! granules.

use crate::bytes::{ByteCount, PAGE_BYTES};
use crate::extent::{EXTENT_PAGES_MAX, PageRun};

/// Why these groups are no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is nothing to lay out.
    #[error("a cache needs at least one group")]
    NoGroups,
    /// A group has a size of zero.
    #[error("group {group:?}: {what} must be 1 or more")]
    Zero {
        /// The group.
        group: String,
        /// Which of its sizes.
        what: &'static str,
    },
    /// Two groups have one name.
    #[error("two groups are named {group:?}")]
    SameName {
        /// The name.
        group: String,
    },
    /// A block's piece is longer than the longest extent.
    #[error(
        "group {group:?}: one block takes {piece} in one piece, and memory comes in pieces of at most {limit}: \
         use fewer tokens a block, or the layer-major order"
    )]
    PieceTooLong {
        /// The group.
        group: String,
        /// Bytes of a block in one plane.
        piece: ByteCount,
        /// The most there can be.
        limit: ByteCount,
    },
    /// The cache cannot hold one block of a group.
    #[error("group {group:?}: one block takes {block}, more than the {bytes} of the whole cache")]
    NoBlocks {
        /// The group.
        group: String,
        /// Bytes of one block.
        block: ByteCount,
        /// Bytes of the cache.
        bytes: ByteCount,
    },
    /// More blocks or bytes than can be counted.
    #[error("group {group:?}: more than 2^31 - 16 blocks, or more bytes than an address can name")]
    TooLarge {
        /// The group.
        group: String,
    },
}

/// What one block of one layer holds. Shapes are in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockShape {
    /// Keys and values of some tokens: `[2, tokens, kv_heads, head_dim]`.
    Attention {
        /// Tokens of a block.
        tokens: u32,
        /// Heads that have keys and values of their own.
        kv_heads: u32,
        /// Elements of one head's key.
        head_dim: u32,
        /// How far back a token looks, if not to the first. The block manager frees nothing by itself for it: whoever
        /// schedules knows which blocks have left the window.
        window: Option<u32>,
    },
    /// The one compressed buffer of multi-head latent attention: `[tokens, dim]`.
    Latent {
        /// Tokens of a block.
        tokens: u32,
        /// Elements of a token, rotary part included.
        dim: u32,
    },
    /// The state of a recurrent layer after some token: `[elements]`. Often longer than a page.
    State {
        /// Elements of it.
        elements: u32,
    },
}

impl BlockShape {
    /// Its dimensions, the slowest first.
    #[must_use]
    pub fn dimensions(self) -> Vec<u64> {
        match self {
            Self::Attention { tokens, kv_heads, head_dim, .. } => {
                vec![2, u64::from(tokens), u64::from(kv_heads), u64::from(head_dim)]
            }
            Self::Latent { tokens, dim } => vec![u64::from(tokens), u64::from(dim)],
            Self::State { elements } => vec![u64::from(elements)],
        }
    }

    /// Tokens of a block; a state stands for a whole prefix, so for none in particular.
    #[must_use]
    pub const fn tokens(self) -> Option<u32> {
        match self {
            Self::Attention { tokens, .. } | Self::Latent { tokens, .. } => Some(tokens),
            Self::State { .. } => None,
        }
    }
}

/// Layers that share block ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    /// Its name, for people and for picking it.
    pub name: String,
    /// How many layers.
    pub layers: u32,
    /// What one block of one layer holds.
    pub shape: BlockShape,
    /// Bytes of an element.
    pub element_bytes: u32,
}

/// What lies next to what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlaneOrder {
    /// All layers of a block side by side: one extent serves whole blocks, so growing takes the fewest driver calls.
    #[default]
    BlockMajor,
    /// All blocks of a layer side by side, for engines that insist: growing takes as many extents as there are layers.
    LayerMajor,
}

/// What a cache shall be.
#[derive(Clone, Debug)]
pub struct CacheSpec {
    /// Its groups; one for most models.
    pub groups: Vec<GroupSpec>,
    /// What lies next to what.
    pub order: PlaneOrder,
    /// The most memory it may ever have, over all groups; rounded up to whole granules.
    pub bytes: ByteCount,
    /// The longest granule, all planes together; rounded down to what the groups can have.
    pub granule_bytes_max: ByteCount,
}

/// Where one group lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupLayout {
    spec: GroupSpec,
    blocks: u32,
    layer_block_bytes: u64,
    piece_bytes: u64,
    planes: u32,
    plane_pages: u64,
    first_page: u64,
    unit_pages: u64,
    granule_units_max: u64,
}

/// A tensor over one layer of a group, in elements of the group's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerView {
    /// Where its first element lies in the cache's region, in bytes.
    pub offset: ByteCount,
    /// Blocks first, then the block's own dimensions.
    pub shape: Vec<u64>,
    /// Elements from one index to the next, for each dimension.
    pub strides: Vec<u64>,
}

impl GroupLayout {
    /// What it was made of.
    #[must_use]
    pub const fn spec(&self) -> &GroupSpec {
        &self.spec
    }

    /// How many blocks it has addresses for: ids are `0..blocks`.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes of one block in all layers.
    #[must_use]
    pub const fn block_bytes(&self) -> ByteCount {
        ByteCount(self.piece_bytes * self.planes as u64)
    }

    /// Bytes of one block in one plane.
    #[must_use]
    pub const fn piece_bytes(&self) -> ByteCount {
        ByteCount(self.piece_bytes)
    }

    /// Planes: 1, or one a layer.
    #[must_use]
    pub const fn planes(&self) -> u32 {
        self.planes
    }

    /// Pages of a unit, the shortest granule, in one plane.
    #[must_use]
    pub const fn unit_pages(&self) -> u64 {
        self.unit_pages
    }

    /// Units of a plane.
    #[must_use]
    pub const fn units(&self) -> u64 {
        self.plane_pages / self.unit_pages
    }

    /// Memory of one unit in all planes.
    #[must_use]
    pub const fn unit_bytes(&self) -> ByteCount {
        ByteCount(self.unit_pages * PAGE_BYTES.0 * self.planes as u64)
    }

    /// Units of the longest granule; a power of two.
    #[must_use]
    pub const fn granule_units_max(&self) -> u64 {
        self.granule_units_max
    }

    /// The pages of a granule in the cache's region: one run a plane.
    #[must_use]
    pub fn runs(&self, first_unit: u64, units: u64) -> Vec<PageRun> {
        (0..u64::from(self.planes))
            .map(|plane| PageRun {
                first: self.first_page + plane * self.plane_pages + first_unit * self.unit_pages,
                count: units * self.unit_pages,
            })
            .collect()
    }

    /// The bytes of one block: offset in the region and length, one a plane.
    pub fn pieces(&self, block: u32) -> impl Iterator<Item = (ByteCount, ByteCount)> + '_ {
        (0..self.planes).map(move |plane| (self.piece_offset(block, plane), ByteCount(self.piece_bytes)))
    }

    /// The bytes of several blocks, plane by plane: which of the blocks, its place in that block's bytes as
    /// [`pieces`](Self::pieces) gives them, its offset in the region and its length. Neighbours in memory come after one another.
    pub fn pieces_by_plane<'a>(
        &'a self,
        blocks: &'a [u32],
    ) -> impl Iterator<Item = (usize, ByteCount, ByteCount, ByteCount)> + 'a {
        (0..self.planes).flat_map(move |plane| {
            let within = ByteCount(u64::from(plane) * self.piece_bytes);
            let piece = move |(at, block): (usize, &u32)| {
                (at, within, self.piece_offset(*block, plane), ByteCount(self.piece_bytes))
            };
            blocks.iter().enumerate().map(piece)
        })
    }

    fn piece_offset(&self, block: u32, plane: u32) -> ByteCount {
        let page = self.first_page + u64::from(plane) * self.plane_pages;
        ByteCount(page * PAGE_BYTES.0 + u64::from(block) * self.piece_bytes)
    }

    /// A tensor over one layer; `None` if there is no such layer.
    #[must_use]
    pub fn view(&self, layer: u32) -> Option<LayerView> {
        if layer >= self.spec.layers {
            return None;
        }
        let (plane, within) = if self.planes == 1 { (0, u64::from(layer)) } else { (u64::from(layer), 0) };
        let offset =
            (self.first_page + plane * self.plane_pages) * PAGE_BYTES.0 + within * self.layer_block_bytes;
        let inner = self.spec.shape.dimensions();
        let mut strides = vec![self.piece_bytes / u64::from(self.spec.element_bytes)];
        strides.extend((1..=inner.len()).map(|from| inner[from..].iter().product::<u64>()));
        let mut shape = vec![u64::from(self.blocks)];
        shape.extend(inner);
        Some(LayerView { offset: ByteCount(offset), shape, strides })
    }

    /// The first unit of a block, in each plane.
    #[must_use]
    pub const fn unit_of(&self, block: u32) -> u64 {
        block as u64 * self.piece_bytes / (self.unit_pages * PAGE_BYTES.0)
    }
}

/// Where everything lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    groups: Vec<GroupLayout>,
    bytes: ByteCount,
    pages: u64,
}

/// Ids fit an `i32` and leave some words of a `u32` over.
const BLOCKS_MAX: u64 = (1 << 31) - 16;

impl CacheLayout {
    /// Lays the groups out, each with addresses for as many blocks as the whole cache could hold: addresses cost nothing,
    /// and which group takes the memory is decided while it runs.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn new(spec: &CacheSpec) -> Result<Self, LayoutError> {
        if spec.groups.is_empty() {
            return Err(LayoutError::NoGroups);
        }
        let mut groups: Vec<GroupLayout> = Vec::with_capacity(spec.groups.len());
        for group in &spec.groups {
            if groups.iter().any(|other| other.spec.name == group.name) {
                return Err(LayoutError::SameName { group: group.name.clone() });
            }
            groups.push(Self::measure(group, spec.order)?);
        }
        let round = groups.iter().map(GroupLayout::unit_bytes).max().unwrap_or(PAGE_BYTES);
        let bytes = spec
            .bytes
            .0
            .checked_next_multiple_of(round.0)
            .map(ByteCount)
            .ok_or_else(|| LayoutError::TooLarge { group: groups[0].spec.name.clone() })?;
        let mut pages = 0_u64;
        for group in &mut groups {
            let too_large = || LayoutError::TooLarge { group: group.spec.name.clone() };
            let blocks = bytes.0 / group.block_bytes().0;
            if spec.bytes < group.block_bytes() {
                let (name, block) = (group.spec.name.clone(), group.block_bytes());
                return Err(LayoutError::NoBlocks { group: name, block, bytes: spec.bytes });
            }
            group.blocks = u32::try_from(blocks)
                .ok()
                .filter(|blocks| u64::from(*blocks) <= BLOCKS_MAX)
                .ok_or_else(too_large)?;
            let unit = group.unit_pages * PAGE_BYTES.0;
            group.plane_pages = (blocks * group.piece_bytes).div_ceil(unit) * group.unit_pages;
            group.first_page = pages;
            let group_pages = group.plane_pages.checked_mul(u64::from(group.planes)).ok_or_else(too_large)?;
            pages = pages.checked_add(group_pages).ok_or_else(too_large)?;
            pages.checked_mul(PAGE_BYTES.0).filter(|_| u32::try_from(pages).is_ok()).ok_or_else(too_large)?;
            let wanted = (spec.granule_bytes_max.0 / group.unit_bytes().0).max(1);
            let most = (EXTENT_PAGES_MAX / group.unit_pages).min(group.units());
            group.granule_units_max = 1 << wanted.min(most).max(1).ilog2();
        }
        Ok(Self { groups, bytes, pages })
    }

    fn measure(spec: &GroupSpec, order: PlaneOrder) -> Result<GroupLayout, LayoutError> {
        let zero = |what| LayoutError::Zero { group: spec.name.clone(), what };
        let too_large = || LayoutError::TooLarge { group: spec.name.clone() };
        if spec.layers == 0 {
            return Err(zero("layers"));
        }
        if spec.element_bytes == 0 {
            return Err(zero("the bytes of an element"));
        }
        let dimensions = spec.shape.dimensions();
        if dimensions.contains(&0) {
            return Err(zero("each dimension of a block"));
        }
        let layer_block_bytes = dimensions
            .into_iter()
            .try_fold(u64::from(spec.element_bytes), u64::checked_mul)
            .ok_or_else(too_large)?;
        let (planes, pieces) = match order {
            PlaneOrder::BlockMajor => (1, u64::from(spec.layers)),
            PlaneOrder::LayerMajor => (spec.layers, 1),
        };
        let piece_bytes = layer_block_bytes.checked_mul(pieces).ok_or_else(too_large)?;
        let unit_pages =
            piece_bytes.div_ceil(PAGE_BYTES.0).checked_next_power_of_two().ok_or_else(too_large)?;
        if unit_pages > EXTENT_PAGES_MAX {
            let (group, piece) = (spec.name.clone(), ByteCount(piece_bytes));
            let limit = ByteCount(EXTENT_PAGES_MAX * PAGE_BYTES.0);
            return Err(LayoutError::PieceTooLong { group, piece, limit });
        }
        Ok(GroupLayout {
            spec: spec.clone(),
            blocks: 0,
            layer_block_bytes,
            piece_bytes,
            planes,
            plane_pages: 0,
            first_page: 0,
            unit_pages,
            granule_units_max: 1,
        })
    }

    /// Its groups, in the order given.
    #[must_use]
    pub fn groups(&self) -> &[GroupLayout] {
        &self.groups
    }

    /// The most memory it may ever have.
    #[must_use]
    pub const fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// Bytes of addresses that it needs.
    #[must_use]
    pub const fn reservation(&self) -> ByteCount {
        ByteCount(self.pages * PAGE_BYTES.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attention(layers: u32, tokens: u32, kv_heads: u32, head_dim: u32) -> GroupSpec {
        GroupSpec {
            name: "full".to_owned(),
            layers,
            shape: BlockShape::Attention { tokens, kv_heads, head_dim, window: None },
            element_bytes: 2,
        }
    }

    fn spec(groups: Vec<GroupSpec>, order: PlaneOrder, mib: u64) -> CacheSpec {
        CacheSpec { groups, order, bytes: ByteCount::mib(mib), granule_bytes_max: ByteCount::mib(256) }
    }

    #[test]
    fn an_8b_model_has_two_mebibytes_a_block() {
        let layout = CacheLayout::new(&spec(vec![attention(32, 16, 8, 128)], PlaneOrder::BlockMajor, 1024));
        let layout = layout.expect("a layout");
        let group = &layout.groups()[0];
        assert_eq!((group.block_bytes(), group.blocks(), group.planes()), (ByteCount::mib(2), 512, 1));
        assert_eq!((group.unit_pages(), group.granule_units_max()), (1, 128));
        let view = group.view(3).expect("a layer");
        assert_eq!(view.offset, ByteCount(3 << 16));
        assert_eq!(view.shape, [512, 2, 16, 8, 128]);
        assert_eq!(view.strides, [1 << 20, 1 << 14, 1024, 128, 1]);
        assert_eq!(group.view(32), None);
    }

    #[test]
    fn layer_major_has_a_plane_a_layer_and_a_granule_over_all() {
        let layout = CacheLayout::new(&spec(vec![attention(32, 16, 8, 128)], PlaneOrder::LayerMajor, 1024));
        let layout = layout.expect("a layout");
        let group = &layout.groups()[0];
        assert_eq!((group.piece_bytes(), group.planes()), (ByteCount(1 << 16), 32));
        assert_eq!((group.unit_bytes(), group.granule_units_max()), (ByteCount::mib(64), 4));
        let runs = group.runs(2, 2);
        assert_eq!((runs.len(), runs[0]), (32, PageRun { first: 2, count: 2 }));
        assert_eq!(runs[31].first, 31 * 16 + 2);
        assert_eq!(group.view(1).expect("a layer").offset, ByteCount::mib(32));
        assert_eq!(
            group.pieces(5).nth(1),
            Some((ByteCount::mib(32) + ByteCount(5 << 16), ByteCount(1 << 16)))
        );
        let (blocks, mut by_plane) = ([5, 6, 2], group.pieces_by_plane(&[5, 6, 2]));
        for plane in 0..32 {
            for (at, block) in blocks.iter().enumerate() {
                let (offset, bytes) = group.pieces(*block).nth(plane).expect("a piece");
                let within = ByteCount((plane as u64) << 16);
                assert_eq!(by_plane.next(), Some((at, within, offset, bytes)));
            }
        }
        assert_eq!(by_plane.next(), None);
    }

    #[test]
    fn a_state_longer_than_a_page_has_a_unit_that_holds_it() {
        let state = GroupSpec {
            name: "state".to_owned(),
            layers: 1,
            shape: BlockShape::State { elements: 5 << 18 },
            element_bytes: 4,
        };
        let layout =
            CacheLayout::new(&spec(vec![attention(2, 16, 1, 80), state], PlaneOrder::BlockMajor, 64));
        let layout = layout.expect("a layout");
        let [full, state] = layout.groups() else { panic!("two groups") };
        assert_eq!((state.piece_bytes(), state.unit_pages(), state.blocks()), (ByteCount::mib(5), 4, 12));
        assert_eq!(full.block_bytes(), ByteCount(2 * 2 * 16 * 80 * 2));
        assert_eq!(state.runs(0, 1)[0].first, 32, "after the 64 MiB of the first group");
        assert_eq!(layout.reservation(), ByteCount::mib(64 + 64));
    }

    #[test]
    fn what_is_no_layout_is_refused_in_words() {
        let new = |groups, mib| CacheLayout::new(&spec(groups, PlaneOrder::BlockMajor, mib)).map(drop);
        assert_eq!(new(vec![], 64), Err(LayoutError::NoGroups));
        assert!(matches!(new(vec![attention(0, 16, 8, 128)], 64), Err(LayoutError::Zero { .. })));
        assert!(matches!(new(vec![attention(2, 16, 0, 128)], 64), Err(LayoutError::Zero { .. })));
        assert!(matches!(
            new(vec![attention(2, u32::MAX, u32::MAX, 9)], 64),
            Err(LayoutError::TooLarge { .. })
        ));
        assert!(matches!(new(vec![attention(4096, 16, 8, 128)], 64), Err(LayoutError::NoBlocks { .. })));
        assert!(matches!(new(vec![attention(8192, 16, 8, 128)], 64), Err(LayoutError::PieceTooLong { .. })));
        assert!(matches!(new(vec![attention(1, 1, 1, 1); 2], 64), Err(LayoutError::SameName { .. })));
        assert!(matches!(new(vec![attention(1, 1, 1, 1)], 1 << 40), Err(LayoutError::TooLarge { .. })));
    }

    fn shape() -> impl Strategy<Value = BlockShape> {
        prop_oneof![
            (1_u32..6, 1_u32..4, 1_u32..70).prop_map(|(tokens, kv_heads, head_dim)| BlockShape::Attention {
                tokens,
                kv_heads,
                head_dim,
                window: None
            }),
            (1_u32..6, 1_u32..200).prop_map(|(tokens, dim)| BlockShape::Latent { tokens, dim }),
            (1_u32..3000).prop_map(|elements| BlockShape::State { elements }),
        ]
    }

    fn group() -> impl Strategy<Value = GroupSpec> {
        let element_bytes = prop_oneof![Just(1_u32), Just(2), Just(4)];
        (1_u32..5, shape(), element_bytes).prop_map(|(layers, shape, element_bytes)| GroupSpec {
            name: String::new(),
            layers,
            shape,
            element_bytes,
        })
    }

    proptest! {
        #[test]
        fn views_cover_each_byte_of_a_block_once_and_groups_lie_apart(
            groups in proptest::collection::vec(group(), 1..4), is_layer_major: bool,
        ) {
            let order = if is_layer_major { PlaneOrder::LayerMajor } else { PlaneOrder::BlockMajor };
            let named = groups.into_iter().enumerate();
            let groups = named.map(|(at, group)| GroupSpec { name: at.to_string(), ..group }).collect();
            let layout = CacheLayout::new(&spec(groups, order, 2)).expect("a layout");
            let mut end_before = 0;
            for group in layout.groups() {
                let element = u64::from(group.spec().element_bytes);
                let block = group.blocks() - 1;
                let mut found = Vec::new();
                for layer in 0..group.spec().layers {
                    let view = group.view(layer).expect("a layer");
                    let first = view.offset.0 + u64::from(block) * view.strides[0] * element;
                    let elements: u64 = view.shape[1..].iter().product();
                    prop_assert_eq!(view.strides[1] * view.shape[1], elements, "a block of a layer is contiguous");
                    found.extend((first..first + elements * element).collect::<Vec<_>>());
                }
                found.sort_unstable();
                let wanted: Vec<u64> =
                    group.pieces(block).flat_map(|(at, bytes)| at.0..at.0 + bytes.0).collect();
                prop_assert_eq!(&found, &wanted);
                prop_assert!(group.pieces(0).all(|(at, _)| at.0 >= end_before), "the group before ends there");
                end_before = found.last().expect("bytes") + 1;
            }
            prop_assert!(end_before <= layout.reservation().0);
        }
    }
}
