//! Weights at rest on a disk: a model's region as it lies in memory, in its order of use, read at the disk's speed.
//!
//! Apart from [`crate::disk`] because a log has one owner, and weights are shared: the workers of all models, and of several
//! servers, read and fill one directory. Files are written once, whole, and never changed, so readers take no lock; whoever
//! fills or makes room takes the directory's, and leaves packs alone that somebody reads. What requests go by is the disk
//! tier's own ([`Medium`]).
//!
//! ```text
//! DIRECTORY/          0700
//!   weights.json      the format; written once
//!   lock              locked by the process that fills
//!   wear.json         how much was written lately
//!   packs/ID          pieces, one after another; each piece lies in one pack, whoever's it is
//!   models/NAME       a manifest (shoal_core::store::weights): extents with their hashes, and where each piece lies
//! ```
//!
//! What is read is compared with the hash of its extent before it is used (I8). Whatever fails is a miss: the region's bytes
//! come from the model's own files as if there were no store.
//!
//! | module | subject |
//! |---|---|
//! | `fill` | storing a region: what is new, room for it, a pack, and the manifest last |
//! | `pack` | many requests at a time, answered in order |
//! | `room` | who goes when room is short, and that nothing goes that somebody reads |
//! | `stored` | one model that is stored, to be read |

mod fill;
mod pack;
mod room;
mod stored;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::process::geteuid;
use shoal_core::bytes::ByteCount;
use shoal_core::store::weights::{MANIFEST_BYTES_MAX, Manifest, StoredModel, WEIGHTS_VERSION, is_name};

use crate::disk::directory::{io_error, lock, write_out};
use crate::disk::{DiskError, Engine, Medium};
use crate::error::MemoryError;

pub use self::fill::{FillReport, FillSpec};
pub(crate) use self::pack::PART_BYTES;
pub use self::stored::Stored;
pub use shoal_core::store::weights::{StoredExtent, cut};

const MARKER: &str = "weights.json";
const MARKER_NEW: &str = "weights.json.new";
const LOCK: &str = "lock";
/// What was written lately: [`shoal_core::store::weights::Wear`].
const WEAR: &str = "wear.json";
const PACKS: &str = "packs";
const MODELS: &str = "models";
/// What is not whole yet. Whoever has the lock removes what was left by one that was killed.
const UNFINISHED: &str = "new";
/// A pack in which something was not right: of no model, and on its way out.
const DAMAGED: &str = "damaged";
/// Longer is no marker.
const MARKER_BYTES_MAX: u64 = 4096;

/// Why weights were not stored, or not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The directory cannot be had, or its files cannot be written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It does not fit, whatever goes.
    #[error("{needed} more do not fit into {bytes_max}, of which what stays takes the rest")]
    NoRoom {
        /// What would be added.
        needed: ByteCount,
        /// The cap.
        bytes_max: ByteCount,
    },
    /// It would be more than may be written to the disk in an hour.
    #[error("{needed} more would be too much for the disk now; in {} s they may be written", wait.as_secs())]
    TooSoon {
        /// What would be written.
        needed: ByteCount,
        /// When it may be.
        wait: Duration,
    },
    /// A request to a pack failed, or took too long.
    #[error("{doing} {}: {reason}", path.display())]
    Failed {
        /// What was being done.
        doing: &'static str,
        /// The pack.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// What was read is not what was stored; it was dropped.
    #[error("{bytes} at offset {offset} are damaged where they lay, and were dropped")]
    Damaged {
        /// Where in the region.
        offset: u64,
        /// How many.
        bytes: ByteCount,
    },
    /// The region is cut another way than the one that was stored.
    #[error("what is stored was laid out another way")]
    OtherLayout,
    /// What was to be stored is not what was recorded of it.
    #[error("the bytes at offset {offset} are not those that were sealed, so they are not stored")]
    Changed {
        /// Where in the region.
        offset: u64,
    },
    /// A name that is none.
    #[error("{name:?} is no name of a model: 8 to 64 hexadecimal digits are")]
    BadName {
        /// What was given.
        name: String,
    },
    /// It was stopped.
    #[error("stopped")]
    Stopped,
    /// Memory to read to could not be had, or could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// How weights are kept. `new()` is what a server uses.
#[derive(Clone, Debug)]
pub struct WeightOptions {
    /// Most bytes that packs take on the disk, those included that somebody reads still.
    pub bytes_max: ByteCount,
    /// How long a model stays from its last use whatever else needs room: what goes is written again at its next start.
    pub keep: Duration,
    /// Most bytes written in an hour by all who fill, so that the disk lasts; none for no limit.
    pub write_bytes_per_hour: Option<ByteCount>,
    /// How requests reach the disk.
    pub engine: Engine,
    /// Whether to go past the page cache where that is possible.
    pub wants_direct: bool,
    /// Requests at a time.
    pub depth: usize,
    /// Most bytes written in a second, so that a fill leaves others their share of the disk.
    pub write_bytes_per_s: ByteCount,
    /// After how long a request counts as hung.
    pub io_deadline: Duration,
}

impl WeightOptions {
    /// The usual, with a cap.
    #[must_use]
    pub const fn new(bytes_max: ByteCount) -> Self {
        Self {
            bytes_max,
            keep: Duration::from_hours(24),
            write_bytes_per_hour: None,
            engine: Engine::Auto,
            wants_direct: true,
            depth: 32,
            write_bytes_per_s: ByteCount::mib(512),
            io_deadline: Duration::from_secs(10),
        }
    }
}

/// What a store holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightUsage {
    /// Models that are stored.
    pub models: usize,
    /// Bytes of all packs.
    pub bytes: ByteCount,
    /// Bytes that the models would take if none shared any.
    pub unshared: ByteCount,
}

/// How a manifest is read.
type ReadFile = fn(&Path) -> io::Result<Vec<u8>>;
type Wrap = dyn Fn(Box<dyn Medium>) -> Box<dyn Medium> + Send + Sync;

/// A directory of weights. Any number of processes may have it open.
#[derive(Clone)]
pub struct WeightStore {
    root: Arc<PathBuf>,
    options: WeightOptions,
    wrap: Arc<Wrap>,
    read_file: ReadFile,
}

impl fmt::Debug for WeightStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeightStore")
            .field("root", &self.root)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// What lies in a directory, read with its lock held.
#[derive(Debug, Default)]
struct Catalogue {
    models: Vec<(StoredModel, Manifest)>,
    packs: BTreeMap<String, u64>,
    /// Of these, which no model needs, and somebody reads still.
    read: BTreeSet<String>,
}

impl WeightStore {
    /// Opens a directory, making it if it is not there.
    ///
    /// # Errors
    /// [`DiskError`]: another version's, something else lies there, damaged, others can change it; or the system's. Nothing is
    /// changed in it then.
    pub fn open(path: &Path, options: WeightOptions) -> Result<Self, DiskError> {
        Self::open_through(path, options, |medium| medium)
    }

    /// As [`WeightStore::open`], with something around each pack's file: what counts, delays or fails its requests.
    ///
    /// # Errors
    /// As [`WeightStore::open`].
    pub fn open_through(
        path: &Path,
        options: WeightOptions,
        wrap: impl Fn(Box<dyn Medium>) -> Box<dyn Medium> + Send + Sync + 'static,
    ) -> Result<Self, DiskError> {
        make_directory(path)?;
        check_private(path)?;
        if !has_marker(path)? {
            check_empty(path)?;
            let marker = serde_json::json!({
                "format": WEIGHTS_VERSION,
                "about": "weights of models, kept by shoal: their files can be read instead",
            });
            // Several may do this at a time: all write the same.
            let new = path.join(format!("{MARKER_NEW}.{}", std::process::id()));
            write_out(&new, &path.join(MARKER), format!("{marker:#}\n").as_bytes())?;
        }
        for folder in [PACKS, MODELS] {
            make_directory(&path.join(folder))?;
            check_private(&path.join(folder))?;
        }
        Ok(Self { root: Arc::new(path.to_owned()), options, wrap: Arc::new(wrap), read_file })
    }

    /// A model that is stored under this name, whole as far as its files' lengths tell. From now on it counts as used.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Stored> {
        if !is_name(name) {
            return None;
        }
        let path = self.model(name);
        let manifest = self.manifest(&path).ok()??;
        // The oldest goes first when room is short; nobody is the worse for it if this cannot be told.
        let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Stored::open(self, path, manifest)
    }

    /// What it holds.
    ///
    /// # Errors
    /// `Io`: nobody knows.
    pub fn usage(&self) -> Result<WeightUsage, DiskError> {
        let catalogue = self.read_all()?;
        Ok(WeightUsage {
            models: catalogue.models.len(),
            bytes: ByteCount(catalogue.packs.values().sum()),
            unshared: ByteCount(catalogue.models.iter().map(|(_, manifest)| manifest.bytes()).sum()),
        })
    }

    fn model(&self, name: &str) -> PathBuf {
        self.root.join(MODELS).join(name)
    }

    fn pack(&self, name: &str) -> PathBuf {
        self.root.join(PACKS).join(name)
    }

    /// A model's manifest, if it is there and right.
    ///
    /// # Errors
    /// `Io`: nobody knows whether it is.
    fn manifest(&self, path: &Path) -> Result<Option<Manifest>, DiskError> {
        match (self.read_file)(path) {
            Ok(bytes) => Ok(Manifest::decode(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("cannot read", path)(error)),
        }
    }

    /// Models whose manifests are right, and packs that are whole.
    ///
    /// # Errors
    /// `Io`: of something that is there it is not known whether it is right, so nobody may take it for damaged.
    fn read_all(&self) -> Result<Catalogue, DiskError> {
        let mut catalogue = Catalogue::default();
        for (name, metadata) in list(&self.root.join(PACKS))? {
            if is_name(name.strip_suffix(&format!(".{DAMAGED}")).unwrap_or(&name)) {
                catalogue.packs.insert(name, metadata.len());
            }
        }
        for (name, metadata) in list(&self.root.join(MODELS))? {
            if !is_name(&name) {
                continue;
            }
            let Some(manifest) = self.manifest(&self.model(&name))? else { continue };
            let is_there = |piece: &shoal_core::store::weights::Piece| {
                catalogue.packs.get(&piece.pack).is_some_and(|bytes| piece.at + piece.bytes <= *bytes)
            };
            if !manifest.pieces.iter().all(is_there) {
                continue;
            }
            let used = metadata.modified().map_or(0, nanoseconds);
            let packs = manifest.packs().into_iter().map(str::to_owned).collect();
            catalogue.models.push((StoredModel { name, used, packs }, manifest));
        }
        Ok(catalogue)
    }

    /// Takes the lock, and removes what nobody can use: unfinished files, damaged manifests, packs of no model, unless somebody
    /// reads them still.
    fn take(&self) -> Result<(File, Catalogue), DiskError> {
        let lock = lock(&self.root)?;
        let mut catalogue = self.read_all()?;
        let known: BTreeSet<&String> = catalogue.models.iter().map(|(model, _)| &model.name).collect();
        for folder in [PACKS, MODELS] {
            for (name, _) in list(&self.root.join(folder))? {
                let whole = name.strip_suffix(&format!(".{UNFINISHED}"));
                let is_useless = whole
                    .map_or_else(|| folder == MODELS && is_name(&name) && !known.contains(&name), is_name);
                if is_useless {
                    remove(&self.root.join(folder).join(&name))?;
                }
            }
        }
        let used: BTreeSet<&String> = catalogue.models.iter().flat_map(|(model, _)| &model.packs).collect();
        let useless: Vec<String> =
            catalogue.packs.keys().filter(|name| !used.contains(name)).cloned().collect();
        for name in useless {
            let path = self.pack(&name);
            // Held until it is gone: who began to read it in between would have it open without its room being counted.
            if let Some(_alone) = room::alone(&path)? {
                remove(&path)?;
                catalogue.packs.remove(&name);
            } else {
                catalogue.read.insert(name);
            }
        }
        Ok((lock, catalogue))
    }
}

/// Since the epoch.
fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn make_directory(path: &Path) -> Result<(), DiskError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io_error("cannot make the directory", path))
}

/// Whose hashes are in a directory that others write to are theirs: what is read there is verified against these alone.
fn check_private(path: &Path) -> Result<(), DiskError> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let stat = open(path, flags, Mode::empty())
        .and_then(fstat)
        .map_err(|errno| io_error("cannot open the directory", path)(errno.into()))?;
    let (own, mode) = (geteuid().as_raw(), stat.st_mode & 0o7777);
    let reason = if stat.st_uid != own {
        format!("belongs to user {}, not {own}", stat.st_uid)
    } else if mode & 0o022 != 0 {
        format!("has mode {mode:04o}, so others can write to it")
    } else {
        return Ok(());
    };
    Err(DiskError::NotPrivate { path: path.to_owned(), reason })
}

/// Whether a directory is ours already.
fn has_marker(path: &Path) -> Result<bool, DiskError> {
    let at = path.join(MARKER);
    let file = match File::open(&at) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io_error("cannot open", &at)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MARKER_BYTES_MAX).read_to_end(&mut bytes).map_err(io_error("cannot read", &at))?;
    let value: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
    match value.and_then(|value| value["format"].as_u64()) {
        Some(found) if found == u64::from(WEIGHTS_VERSION) => Ok(true),
        Some(found) => Err(DiskError::OtherVersion { path: path.to_owned(), found, ours: WEIGHTS_VERSION }),
        None => Err(DiskError::Damaged { path: at, reason: "it names no format".to_owned() }),
    }
}

fn check_empty(path: &Path) -> Result<(), DiskError> {
    for entry in fs::read_dir(path).map_err(io_error("cannot list", path))? {
        let name = entry.map_err(io_error("cannot list", path))?.file_name();
        let name = name.to_string_lossy();
        let is_ours = [LOCK, PACKS, MODELS, MARKER, WEAR, "lost+found"].contains(&&*name)
            || name.starts_with(MARKER_NEW);
        if !is_ours {
            return Err(DiskError::Foreign { path: path.to_owned(), entry: name.into_owned() });
        }
    }
    Ok(())
}

fn list(folder: &Path) -> Result<Vec<(String, fs::Metadata)>, DiskError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_error("cannot list", folder))? {
        let entry = entry.map_err(io_error("cannot list", folder))?;
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            // It went meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io_error("cannot look at", &entry.path())(error)),
        };
        if let (Ok(name), true) = (entry.file_name().into_string(), metadata.is_file()) {
            found.push((name, metadata));
        }
    }
    Ok(found)
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MANIFEST_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn remove(path: &Path) -> Result<(), DiskError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("cannot remove", path)(error)),
        _ => Ok(()),
    }
}
