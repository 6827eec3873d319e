//! How a prefix index is set up, and what it refuses.

/// Which blocks of a prefix a group of layers needs, so that a sequence can go on from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GroupRule {
    /// Full attention: every block from the first.
    Full,
    /// Sliding window attention: the blocks with the last `tokens - 1` tokens before the next one.
    Window {
        /// Tokens that a token attends to, itself included.
        tokens: u32,
    },
    /// Recurrent state: the block that holds the state after the last token of the prefix, and no other.
    Last,
}

impl GroupRule {
    /// How many blocks before the end must be there; `None` for all.
    #[must_use]
    pub const fn blocks_needed(self, block_tokens: u32) -> Option<u32> {
        match self {
            Self::Full => None,
            // Also a window of one token needs a block, or anything would count as found.
            Self::Window { tokens } => {
                let blocks = tokens.saturating_sub(1).div_ceil(block_tokens);
                Some(if blocks == 0 { 1 } else { blocks })
            }
            Self::Last => Some(1),
        }
    }
}

/// One group of layers that share block ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupOptions {
    /// What it needs of a prefix.
    pub rule: GroupRule,
    /// How many blocks it has: ids are below this.
    pub blocks: u32,
}

/// How a [`PrefixIndex`](super::PrefixIndex) is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixOptions {
    /// Tokens in a block, the same for all groups.
    pub block_tokens: u32,
    /// The groups, in the order in which lists of blocks are given; at least one.
    pub groups: Vec<GroupOptions>,
    /// Seed of the keys. Equal seeds give equal keys in all processes; a secret one keeps others from computing them.
    pub seed: u64,
    /// Events kept for readers; the oldest are lost beyond it. 0 for none.
    pub events_max: usize,
    /// Nodes of the tree, holes included. `None`: four times the blocks of all groups.
    pub nodes_max: Option<u32>,
}

impl PrefixOptions {
    /// One group of full attention with `blocks` blocks, 4096 events.
    #[must_use]
    pub fn full(block_tokens: u32, blocks: u32) -> Self {
        Self {
            block_tokens,
            groups: vec![GroupOptions { rule: GroupRule::Full, blocks }],
            seed: 0,
            events_max: 4096,
            nodes_max: None,
        }
    }
}

/// Why a call was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrefixError {
    /// Options that make no index.
    #[error(
        "{block_tokens} tokens a block and {groups} groups make no prefix index: both must be at least 1, groups at most 64, and tokens at most 65536"
    )]
    Options {
        /// Tokens in a block.
        block_tokens: u32,
        /// Groups given.
        groups: usize,
    },
    /// Not one list of blocks for each group.
    #[error("{given} lists of blocks for {groups} groups: give one each")]
    Groups {
        /// Lists given.
        given: usize,
        /// Groups there are.
        groups: usize,
    },
    /// There is no such group.
    #[error("group {group} does not exist: there are {groups} groups")]
    UnknownGroup {
        /// The group given.
        group: usize,
        /// How many there are.
        groups: usize,
    },
    /// Fewer blocks than the tokens fill.
    #[error("group {group}: {given} blocks for {full} full blocks of tokens")]
    Blocks {
        /// The group.
        group: usize,
        /// Blocks given.
        given: usize,
        /// Blocks that the tokens fill.
        full: usize,
    },
    /// There is no such block.
    #[error("group {group}: block {block} does not exist: there are {blocks} blocks")]
    UnknownBlock {
        /// The group.
        group: usize,
        /// The id given.
        block: u32,
        /// How many there are.
        blocks: u32,
    },
    /// The block is sealed with other content, or named twice.
    #[error("group {group}: block {block} is sealed with other content, or named twice")]
    SealedAlready {
        /// The group.
        group: usize,
        /// The id given.
        block: u32,
    },
    /// The block is not in the state that the call needs.
    #[error("group {group}: block {block} is {is}, and the call needs one that is {needed}")]
    BlockState {
        /// The group.
        group: usize,
        /// The id given.
        block: u32,
        /// What it is.
        is: &'static str,
        /// What it should be.
        needed: &'static str,
    },
    /// The position was in a part of the tree that is gone: start from the salt.
    #[error("the position is no longer in the tree: seal from the start of the sequence")]
    StalePosition,
    /// A key of a length that is not taken.
    #[error("a key of {bytes} bytes: give 1 to {max}")]
    KeyLength {
        /// Its length.
        bytes: usize,
        /// The longest that is taken.
        max: usize,
    },
}
