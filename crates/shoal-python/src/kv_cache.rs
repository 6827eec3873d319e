//! `KvCache` and its groups.
//!
//! The calls that engines make thousands of times a second (`alloc_into`, `free_from`, the list forms beside them, `fork`,
//! `available`, `hint`) keep the GIL while they take what has memory: letting it go for a hundred nanoseconds could cost a
//! switch interval. They only try the cache's lock, which no thread of ours holds while it takes the GIL; where it is held,
//! or memory has to be mapped first, they let the GIL go and wait, with a list of their own, as the caller's buffer is
//! others' then. `record_step` asks the driver, which may block (I9), and what takes as long as a prompt is (`match`, `seal`)
//! lets others run meanwhile.

use std::sync::Arc;

use pyo3::exceptions::{PyBufferError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};
use serde::Deserialize;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::blocks::{BlockError, BlockState};
use shoal_core::kv::compact::BlockMove;
use shoal_core::kv::eviction::{CostModel, EvictionKind};
use shoal_core::kv::ids::BlockId;
use shoal_core::kv::layout::{BlockShape, CacheSpec, GroupSpec, PlaneOrder};
use shoal_core::kv::prefix::{BlockKey, EventKind, Found, NO_BLOCK, Sealed, Start};
use shoal_core::kv::reuse::ReuseOptions;
use shoal_core::kv::state::KvError;
use shoal_memory::kv_cache::Attempt;
use shoal_memory::{KvCache, KvCacheSpec, MemoryError};

use crate::buffer::{self, Integers, IntegersMut};
use crate::convert::{self, ReportTuple};
use crate::errors;
use crate::owner::Owned;
use crate::region::PyRegion;
use crate::torch_hooks;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupWords {
    name: String,
    kind: String,
    layers: u32,
    /// Tokens of a block; none for a state.
    tokens: Option<u32>,
    kv_heads: Option<u32>,
    /// Elements of a head, of a latent token, or of a state.
    elements: u32,
    window: Option<u32>,
    element_bytes: u32,
    /// The byte that freed blocks are filled with in debug mode.
    fill: u8,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CacheWords {
    name: String,
    groups: Vec<GroupWords>,
    layout: String,
    max_bytes: u64,
    granule_max: u64,
    spare_max: Option<u64>,
    patience_s: f64,
    eviction: Option<String>,
    seed: u64,
    events_max: usize,
    debug: bool,
}

impl GroupWords {
    fn shape(&self) -> PyResult<BlockShape> {
        let missing = |what| PyValueError::new_err(format!("group {:?}: {what} is missing", self.name));
        let tokens = || self.tokens.ok_or_else(|| missing("block_tokens"));
        Ok(match self.kind.as_str() {
            "full" | "window" => BlockShape::Attention {
                tokens: tokens()?,
                kv_heads: self.kv_heads.ok_or_else(|| missing("kv_heads"))?,
                head_dim: self.elements,
                window: self.window,
            },
            "latent" => BlockShape::Latent { tokens: tokens()?, dim: self.elements },
            "state" => BlockShape::State { elements: self.elements },
            other => {
                return Err(PyValueError::new_err(format!(
                    "group {:?}: kind must be \"full\", \"window\", \"latent\" or \"state\", not {other:?}",
                    self.name
                )));
            }
        })
    }
}

/// Reads what a cache shall be.
pub(crate) fn spec(words: &Bound<'_, PyAny>) -> PyResult<KvCacheSpec> {
    let words: CacheWords = convert::from_plain("a KV cache", words)?;
    let order = match words.layout.as_str() {
        "block" => PlaneOrder::BlockMajor,
        "layer" => PlaneOrder::LayerMajor,
        other => {
            let message = format!("layout must be \"block\" or \"layer\", not {other:?}");
            return Err(PyValueError::new_err(message));
        }
    };
    let eviction = match words.eviction.as_deref() {
        None => None,
        Some("lru") => Some(EvictionKind::Lru),
        Some("s3fifo") => Some(EvictionKind::S3Fifo),
        Some("cost") => Some(EvictionKind::CostAware(CostModel::default())),
        Some(other) => {
            return Err(PyValueError::new_err(format!(
                "eviction must be \"lru\", \"s3fifo\", \"cost\" or None, not {other:?}"
            )));
        }
    };
    let group = |group: &GroupWords| -> PyResult<GroupSpec> {
        let shape = group.shape()?;
        let (name, layers, element_bytes) = (group.name.clone(), group.layers, group.element_bytes);
        Ok(GroupSpec { name, layers, shape, element_bytes })
    };
    let cache = CacheSpec {
        groups: words.groups.iter().map(group).collect::<PyResult<_>>()?,
        order,
        bytes: ByteCount(words.max_bytes),
        granule_bytes_max: ByteCount(words.granule_max),
    };
    let mut spec = KvCacheSpec::new(&words.name, cache);
    if let Some(spare) = words.spare_max {
        spec.spare_bytes_max = ByteCount(spare);
    }
    spec.is_debug = words.debug;
    spec.fills = words.groups.iter().map(|group| group.fill).collect();
    spec.patience = convert::seconds("patience_s", words.patience_s)?;
    let (seed, events_max) = (words.seed, words.events_max);
    spec.reuse = eviction.map(|eviction| ReuseOptions { eviction, seed, events_max });
    Ok(spec)
}

/// How long a compaction waits, at most, if nothing else is said.
const COMPACT_TIMEOUT_S: f64 = 60.0;

/// The blocks of one group.
#[pyclass(frozen, name = "KvGroup", module = "shoal._native")]
pub(crate) struct PyKvGroup {
    cache: Owned<Arc<KvCache>>,
    group: usize,
    blocks: u32,
}

/// What a short call came to.
enum Tried<T> {
    Done(usize),
    /// It has to wait or to map, for which the GIL is let go first.
    Later(T),
}

impl PyKvGroup {
    /// A block that there is.
    fn known(&self, id: &Bound<'_, PyAny>) -> PyResult<u32> {
        known(id_of(id)?, self.blocks)
    }

    #[inline]
    fn try_fill<T: BlockId>(&self, ids: &mut [T]) -> PyResult<Tried<usize>> {
        let attempt = self.cache.get_fast()?.try_alloc(self.group, ids).map_err(errors::of_memory)?;
        Ok(if attempt == Attempt::Done { Tried::Done(ids.len()) } else { Tried::Later(ids.len()) })
    }

    /// Blocks in a list of our own: others may write to a caller's buffer while the GIL is let go.
    fn fill(&self, py: Python<'_>, count: usize) -> PyResult<Option<Vec<u32>>> {
        let cache = self.cache.get()?;
        if count > self.blocks as usize {
            return Ok(None);
        }
        let mut own = vec![0_u32; count];
        let is_done = py.detach(|| cache.alloc(self.group, &mut own)).map_err(errors::of_memory)?;
        Ok(is_done.then_some(own))
    }

    #[inline]
    fn try_give<T: BlockId>(&self, ids: &[T]) -> PyResult<Tried<Vec<i64>>> {
        let attempt = self.cache.get_fast()?.try_free(self.group, ids).map_err(errors::of_memory)?;
        Ok(if attempt == Attempt::Done { Tried::Done(ids.len()) } else { Tried::Later(shown(ids)) })
    }

    fn give(&self, py: Python<'_>, tried: Tried<Vec<i64>>) -> PyResult<()> {
        let Tried::Later(own) = tried else { return Ok(()) };
        let cache = self.cache.get()?;
        py.detach(|| cache.free(self.group, &own)).map_err(errors::of_memory)
    }
}

/// Puts blocks into a buffer; how many, which is as many as it takes or none.
fn put<T: BlockId>(ids: &mut [T], blocks: &[u32]) -> usize {
    if ids.len() != blocks.len() {
        return 0;
    }
    for (id, block) in ids.iter_mut().zip(blocks) {
        *id = T::of(*block);
    }
    blocks.len()
}

#[pymethods]
impl PyKvGroup {
    /// Fill a buffer of 32 or 64 bit integers with blocks; the number of them, or 0.
    fn alloc_into(&self, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let tried = buffer::with_integers_mut(buffer, |ids| match ids {
            IntegersMut::Int32(ids) => self.try_fill(ids),
            IntegersMut::Uint32(ids) => self.try_fill(ids),
            IntegersMut::Int64(ids) => self.try_fill(ids),
            IntegersMut::Uint64(ids) => self.try_fill(ids),
        })?;
        let count = match tried {
            Tried::Done(count) => return Ok(count),
            Tried::Later(count) => count,
        };
        let Some(own) = self.fill(buffer.py(), count)? else { return Ok(0) };
        let done = buffer::with_integers_mut(buffer, |ids| {
            Ok(match ids {
                IntegersMut::Int32(ids) => put(ids, &own),
                IntegersMut::Uint32(ids) => put(ids, &own),
                IntegersMut::Int64(ids) => put(ids, &own),
                IntegersMut::Uint64(ids) => put(ids, &own),
            })
        });
        if done.as_ref().is_ok_and(|done| *done == own.len()) {
            return done;
        }
        // Somebody made the buffer shorter meanwhile: nobody knows of these blocks.
        self.give(buffer.py(), Tried::Later(shown(&own)))?;
        done.and(Err(PyBufferError::new_err("the buffer's length has changed during the call")))
    }

    /// Take one owner from each block in a buffer of 32 or 64 bit integers.
    fn free_from(&self, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
        let tried = buffer::with_integers(buffer, |ids| match ids {
            Integers::Int32(ids) => self.try_give(ids),
            Integers::Uint32(ids) => self.try_give(ids),
            Integers::Int64(ids) => self.try_give(ids),
            Integers::Uint64(ids) => self.try_give(ids),
        })?;
        self.give(buffer.py(), tried)
    }

    /// A list of so many blocks, or None.
    fn alloc<'py>(&self, py: Python<'py>, n: usize) -> PyResult<Option<Bound<'py, PyList>>> {
        if n > self.blocks as usize {
            return Ok(None);
        }
        let mut ids = vec![0_u32; n];
        if let Tried::Later(count) = self.try_fill(&mut ids)? {
            let Some(own) = self.fill(py, count)? else { return Ok(None) };
            ids = own;
        }
        PyList::new(py, ids).map(Some)
    }

    /// Take one owner from each of these blocks.
    fn free(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let tried = self.try_give(&list_of_ids(ids)?)?;
        self.give(py, tried)
    }

    /// One owner more for each of these blocks.
    fn fork(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let (cache, ids) = (self.cache.get_fast()?, list_of_ids(ids)?);
        if cache.try_fork(self.group, &ids).map_err(errors::of_memory)? == Attempt::Done {
            return Ok(());
        }
        let cache = self.cache.get()?;
        py.detach(|| cache.fork(self.group, &ids)).map_err(errors::of_memory)
    }

    fn available(&self, py: Python<'_>) -> PyResult<u32> {
        let found = self.cache.get_fast()?.try_available(self.group).map_err(errors::of_memory)?;
        if let Some(found) = found {
            return Ok(found);
        }
        let cache = self.cache.get()?;
        py.detach(|| cache.available(self.group)).map_err(errors::of_memory)
    }

    fn hint(&self, py: Python<'_>, blocks: &Bound<'_, PyAny>) -> PyResult<()> {
        let blocks = count_of("blocks", blocks)?;
        let tried = self.cache.get_fast()?.try_hint(self.group, blocks).map_err(errors::of_memory)?;
        if tried == Attempt::Done {
            return Ok(());
        }
        let cache = self.cache.get()?;
        py.detach(|| cache.hint(self.group, blocks)).map_err(errors::of_memory)
    }

    /// `None`: nobody's; else how many own it, 0 if it is only cached.
    fn owners(&self, py: Python<'_>, block: &Bound<'_, PyAny>) -> PyResult<Option<u32>> {
        let (cache, block) = (self.cache.get()?, self.known(block)?);
        let state = py.detach(|| cache.state_of(self.group, block)).map_err(errors::of_memory)?;
        Ok(match state {
            BlockState::Free => None,
            BlockState::Cached => Some(0),
            BlockState::Owned(count) => Some(count),
        })
    }

    fn forget(&self, py: Python<'_>, block: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (cache, block) = (self.cache.get()?, self.known(block)?);
        py.detach(|| cache.forget(self.group, block)).map_err(errors::of_memory)
    }

    /// Moves as (from, to): carried out, or only planned.
    fn compact(
        &self,
        py: Python<'_>,
        apply: bool,
        moves_max: Option<usize>,
        timeout_s: Option<f64>,
    ) -> PyResult<Vec<(u32, u32)>> {
        let cache = self.cache.get()?;
        let most = moves_max.unwrap_or(usize::MAX);
        let timeout = convert::seconds("timeout_s", timeout_s.unwrap_or(COMPACT_TIMEOUT_S))?;
        let act = || {
            if apply {
                cache.compact(self.group, most, timeout)
            } else {
                cache.plan_compaction(self.group, most)
            }
        };
        let moves = py.detach(act).map_err(errors::of_memory)?;
        Ok(moves.into_iter().map(|planned| (planned.from, planned.to)).collect())
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn moved(&self, py: Python<'_>, moves: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>) -> PyResult<()> {
        let cache = self.cache.get()?;
        let planned = |(from, to): &(Bound<'_, PyAny>, Bound<'_, PyAny>)| -> PyResult<BlockMove> {
            Ok(BlockMove { from: self.known(from)?, to: self.known(to)? })
        };
        let moves = moves.iter().map(planned).collect::<PyResult<Vec<_>>>()?;
        py.detach(|| cache.moved(self.group, &moves)).map_err(errors::of_memory)
    }

    #[getter]
    fn blocks(&self) -> PyResult<u32> {
        self.cache.get()?;
        Ok(self.blocks)
    }

    #[getter]
    fn block_bytes(&self) -> PyResult<u64> {
        Ok(self.cache.get()?.layout(self.group).map_err(errors::of_memory)?.block_bytes().0)
    }

    /// Memory that comes and goes at the least, in bytes.
    #[getter]
    fn granule_min(&self) -> PyResult<u64> {
        Ok(self.cache.get()?.layout(self.group).map_err(errors::of_memory)?.unit_bytes().0)
    }

    /// Offset in the region, shape and strides in elements of one layer.
    fn view(&self, layer: u32) -> PyResult<Option<ViewTuple>> {
        let layout = self.cache.get()?.layout(self.group).map_err(errors::of_memory)?;
        Ok(layout.view(layer).map(|view| (view.offset.0, view.shape, view.strides)))
    }
}

/// KV blocks with memory behind them.
#[pyclass(frozen, name = "KvCache", module = "shoal._native")]
pub(crate) struct PyKvCache {
    cache: Owned<Arc<KvCache>>,
}

/// Offset, shape, strides.
type ViewTuple = (u64, Vec<u64>, Vec<u64>);

/// Blocks in the tree, and blocks whose content was there: group, place, given, kept.
type SealedTuple = (usize, Vec<(usize, usize, u32, u32)>);

impl PyKvCache {
    pub(crate) fn new(cache: KvCache) -> Self {
        Self { cache: Owned::new(Arc::new(cache)) }
    }

    pub(crate) fn get(&self) -> PyResult<&Arc<KvCache>> {
        self.cache.get()
    }
}

#[pymethods]
impl PyKvCache {
    #[getter]
    fn region(&self) -> PyResult<PyRegion> {
        Ok(PyRegion::new(self.cache.get()?.region().clone()))
    }

    fn groups(&self) -> PyResult<Vec<PyKvGroup>> {
        let cache = self.cache.get()?;
        let group = |group| {
            let blocks = cache.layout(group).map_err(errors::of_memory)?.blocks();
            Ok(PyKvGroup { cache: Owned::new(Arc::clone(cache)), group, blocks })
        };
        (0..cache.groups()).map(group).collect()
    }

    #[getter]
    fn block_tokens(&self) -> PyResult<Option<u32>> {
        Ok(self.cache.get()?.block_tokens())
    }

    /// Waits until a reclaim wants what the engine only remembers: the question's number, and bytes.
    fn next_wanted(&self, py: Python<'_>, timeout_s: f64) -> PyResult<Option<(u64, u64)>> {
        let cache = self.cache.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        Ok(py.detach(|| cache.next_wanted(timeout)).map(|(number, bytes)| (number, bytes.0)))
    }

    fn answer_wanted(&self, py: Python<'_>, number: u64, freed: u64) -> PyResult<()> {
        let cache = self.cache.get()?;
        py.detach(|| cache.answer_wanted(number, ByteCount(freed)));
        Ok(())
    }

    fn set_kept(&self, py: Python<'_>, nbytes: u64) -> PyResult<()> {
        let cache = self.cache.get()?;
        py.detach(|| cache.set_kept(ByteCount(nbytes)));
        Ok(())
    }

    fn set_limit(&self, py: Python<'_>, nbytes: u64, revision: Option<u64>) -> PyResult<()> {
        let cache = self.cache.get()?;
        py.detach(|| cache.set_limit(ByteCount(nbytes), revision)).map_err(errors::of_memory)
    }

    fn record_step(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        let cache = self.cache.get()?;
        py.detach(|| cache.record_step(torch_hooks::stream_of(stream))).map_err(errors::of_memory)
    }

    fn trim(&self, py: Python<'_>, nbytes: u64, cached: bool) -> PyResult<ReportTuple> {
        let cache = self.cache.get()?;
        let bytes = ByteCount(nbytes);
        py.detach(|| if cached { cache.trim_cached(bytes) } else { cache.trim(bytes) })
            .map(|report| convert::evicted(py, report))
            .map_err(errors::of_memory)
    }

    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let cache = self.cache.get()?;
        let usage = py.detach(|| cache.usage());
        let dict = PyDict::new(py);
        dict.set_item("limit", usage.limit.0)?;
        dict.set_item("revision", usage.revision)?;
        dict.set_item("reservation", usage.reservation.0)?;
        dict.set_item("mapped", usage.mapped.0)?;
        dict.set_item("live", usage.live.0)?;
        dict.set_item("cached", usage.cached.0)?;
        dict.set_item("empty", usage.empty.0)?;
        dict.set_item("block_tokens", cache.block_tokens())?;
        let groups = PyList::empty(py);
        for group in usage.groups {
            let entry = PyDict::new(py);
            entry.set_item("mapped", group.mapped.0)?;
            entry.set_item("owned_blocks", group.blocks.owned)?;
            entry.set_item("cached_blocks", group.blocks.cached)?;
            entry.set_item("free_mapped_blocks", group.blocks.available)?;
            entry.set_item("spare_target_blocks", group.spare_target)?;
            groups.append(entry)?;
        }
        dict.set_item("groups", groups)?;
        Ok(dict)
    }

    /// The length of the prefix that was found in tokens, and the blocks of each group.
    fn find(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
    ) -> PyResult<(usize, Vec<Vec<u32>>)> {
        let (cache, salt, tokens) = (self.cache.get()?, bytes_of("salt", salt)?, list_of_tokens(tokens)?);
        let mut found = Found::default();
        py.detach(|| cache.find(&salt, &tokens, &mut found)).map_err(errors::of_memory)?;
        Ok((found.tokens, found.groups.into_iter().map(|group| group.blocks).collect()))
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn find_keys(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        keys: Vec<Bound<'_, PyBytes>>,
    ) -> PyResult<(usize, Vec<Vec<u32>>)> {
        let (cache, salt) = (self.cache.get()?, bytes_of("salt", salt)?);
        let keys: Vec<Vec<u8>> = keys.iter().map(|key| key.as_bytes().to_vec()).collect();
        let mut found = Found::default();
        let find = || {
            let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
            cache.find_keys(&salt, &keys, &mut found)
        };
        py.detach(find).map_err(errors::of_memory)?;
        Ok((found.blocks, found.groups.into_iter().map(|group| group.blocks).collect()))
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn seal(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        blocks: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<SealedTuple> {
        let (cache, salt, tokens) = (self.cache.get()?, bytes_of("salt", salt)?, list_of_tokens(tokens)?);
        let blocks = lists_of_blocks(cache, &blocks)?;
        let seal = || {
            let blocks: Vec<&[u32]> = blocks.iter().map(Vec::as_slice).collect();
            cache.seal(Start::Salt(&salt), &tokens, &blocks)
        };
        Ok(sealed(&py.detach(seal).map_err(errors::of_memory)?))
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn seal_keys(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        after: Option<Bound<'_, PyBytes>>,
        keys: Vec<Bound<'_, PyBytes>>,
        blocks: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<SealedTuple> {
        let (cache, salt) = (self.cache.get()?, bytes_of("salt", salt)?);
        let blocks = lists_of_blocks(cache, &blocks)?;
        let after = after.map(|key| key.as_bytes().to_vec());
        let keys: Vec<Vec<u8>> = keys.iter().map(|key| key.as_bytes().to_vec()).collect();
        let seal = || {
            let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
            let blocks: Vec<&[u32]> = blocks.iter().map(Vec::as_slice).collect();
            cache.seal_keys(&salt, after.as_deref(), &keys, &blocks)
        };
        Ok(sealed(&py.detach(seal).map_err(errors::of_memory)?))
    }

    fn forget_all(&self, py: Python<'_>) -> PyResult<()> {
        let cache = self.cache.get()?;
        py.detach(|| cache.forget_all()).map_err(errors::of_memory)
    }

    /// Events from a number on, how many before were lost, and the number to ask for next.
    fn events<'py>(
        &self,
        py: Python<'py>,
        since: u64,
        most: usize,
    ) -> PyResult<(Bound<'py, PyList>, u64, u64)> {
        let cache = self.cache.get()?;
        let batch = py.detach(|| cache.events_since(since, most)).map_err(errors::of_memory)?;
        let events = PyList::empty(py);
        for event in batch.events {
            let entry = PyDict::new(py);
            entry.set_item("sequence", event.sequence)?;
            entry.set_item("group", event.group)?;
            match event.kind {
                EventKind::Stored { key, parent } => {
                    entry.set_item("kind", "stored")?;
                    entry.set_item("key", key_of(py, &key))?;
                    entry.set_item("parent", parent.map(|key| key_of(py, &key)))?;
                }
                EventKind::Removed { key } => {
                    entry.set_item("kind", "removed")?;
                    entry.set_item("key", key_of(py, &key))?;
                }
                EventKind::Cleared => entry.set_item("kind", "cleared")?,
            }
            events.append(entry)?;
        }
        Ok((events, batch.lost, batch.next))
    }

    fn prefix_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let cache = self.cache.get()?;
        let stats = py.detach(|| cache.prefix_stats()).map_err(errors::of_memory)?;
        let dict = PyDict::new(py);
        dict.set_item("stored", stats.stored)?;
        dict.set_item("removed", stats.removed)?;
        dict.set_item("duplicates", stats.duplicates)?;
        dict.set_item("collisions", stats.collisions)?;
        dict.set_item("full", stats.full)?;
        Ok(dict)
    }

    /// Writes to blocks that nobody owned: group, block, and the first wrong byte from the region's start.
    fn strays(&self, py: Python<'_>) -> PyResult<Vec<(usize, u32, u64)>> {
        let cache = self.cache.get()?;
        let strays = py.detach(|| cache.strays()).map_err(errors::of_memory)?;
        Ok(strays.into_iter().map(|stray| (stray.group, stray.block, stray.offset.0)).collect())
    }

    /// Says what is wrong, if anything is.
    fn check(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let cache = self.cache.get()?;
        Ok(py.detach(|| cache.check_invariants()).err())
    }
}

fn sealed(sealed: &Sealed) -> SealedTuple {
    let duplicates = sealed.duplicates.iter().map(|same| (same.group, same.at, same.given, same.kept));
    (sealed.blocks, duplicates.collect())
}

fn key_of<'py>(py: Python<'py>, key: &BlockKey) -> Bound<'py, PyBytes> {
    match key {
        BlockKey::Tokens(key) => PyBytes::new(py, &key.to_le_bytes()),
        BlockKey::Engine(bytes) => PyBytes::new(py, bytes),
    }
}

/// Text or bytes.
pub(crate) fn bytes_of(what: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    if let Ok(text) = value.cast::<PyString>() {
        // Never lossy: two tenants must not become one (I12).
        return Ok(text.to_str()?.as_bytes().to_vec());
    }
    match value.cast::<PyBytes>() {
        Ok(bytes) => Ok(bytes.as_bytes().to_vec()),
        Err(_) => Err(PyTypeError::new_err(format!("{what} must be str or bytes"))),
    }
}

/// An id as it is given; what 64 bits do not hold is the nearest number that they do, which is no block either.
fn id_of(id: &Bound<'_, PyAny>) -> PyResult<i64> {
    match id.extract::<i64>() {
        Err(error) if error.is_instance_of::<PyOverflowError>(id.py()) => {
            Ok(if id.lt(0)? { i64::MIN } else { i64::MAX })
        }
        extracted => extracted,
    }
}

/// A block, of so many that there are.
fn known(block: i64, blocks: u32) -> PyResult<u32> {
    let unknown =
        || errors::of_memory(MemoryError::Kv(KvError::Blocks(BlockError::Unknown { block, blocks })));
    u32::try_from(block).ok().filter(|known| *known < blocks).ok_or_else(unknown)
}

/// A number of blocks.
fn count_of(what: &str, count: &Bound<'_, PyAny>) -> PyResult<u32> {
    count.extract().map_err(|error: PyErr| {
        if !error.is_instance_of::<PyOverflowError>(count.py()) {
            return error;
        }
        PyValueError::new_err(format!("{what} must be between 0 and {}, not {count}", u32::MAX))
    })
}

/// Ids of a list, or of a buffer; what is no block stays what it is, for the message.
fn list_of_ids(ids: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    if ids.is_instance_of::<PyList>() {
        match ids.extract::<Vec<i64>>() {
            Err(error) if error.is_instance_of::<PyOverflowError>(ids.py()) => {}
            extracted => return extracted,
        }
    } else {
        let shown = buffer::with_integers(ids, |ids| {
            Ok(match ids {
                Integers::Int32(ids) => shown(ids),
                Integers::Uint32(ids) => shown(ids),
                Integers::Int64(ids) => shown(ids),
                Integers::Uint64(ids) => shown(ids),
            })
        });
        if shown.is_ok() {
            return shown;
        }
    }
    ids.try_iter()?.map(|id| id_of(&id?)).collect()
}

fn shown<T: BlockId>(ids: &[T]) -> Vec<i64> {
    ids.iter().map(|id| id.shown()).collect()
}

pub(crate) fn list_of_tokens(tokens: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let ids = list_of_ids(tokens)?;
    let token = |token: i64| {
        let wrong = || PyOverflowError::new_err(format!("token {token} is not between 0 and 4294967295"));
        u32::try_from(token).map_err(|_| wrong())
    };
    ids.into_iter().map(token).collect()
}

/// Lists of blocks, one a group; -1 where a group has none.
fn lists_of_blocks(cache: &KvCache, lists: &[Bound<'_, PyAny>]) -> PyResult<Vec<Vec<u32>>> {
    let list = |(group, list): (usize, &Bound<'_, PyAny>)| {
        // That there are more lists than groups is refused where they are sealed.
        let blocks = cache.layout(group).map_or(NO_BLOCK, |layout| layout.blocks());
        let block = |id: i64| if id == -1 { Ok(NO_BLOCK) } else { known(id, blocks) };
        list_of_ids(list)?.into_iter().map(block).collect()
    };
    lists.iter().enumerate().map(list).collect()
}
