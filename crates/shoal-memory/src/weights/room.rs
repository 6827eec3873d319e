//! Room for a pack: which models go, which packs are free to, and whether the disk may be written to by now.
//!
//! Apart because the cap is of what the disk holds, and a file that somebody reads stays there whatever its name: whoever reads
//! a pack has it locked with others, and none is removed but by who has it locked alone. What is refused counts as there.
//!
//! Room has to be made before it is used, so a fill that fails after that was in vain. What keeps a shelf that is larger than the
//! disk from being written again at every start are two bounds: what was used lately stays, and an hour has its allowance.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use shoal_core::bytes::ByteCount;
use shoal_core::store::weights::{StoredModel, Wear, make_room};

use super::{Catalogue, UNFINISHED, WEAR, WeightStore, WeightsError, nanoseconds, remove};
use crate::disk::DiskError;
use crate::disk::directory::{io_error, write_out};

/// How often, and after what pause, a reader tries again while somebody sees whether a pack may go: a moment's work.
const READ_TRIES: u32 = 100;
const READ_PAUSE: Duration = Duration::from_millis(10);

impl WeightStore {
    /// Removes models, and the packs that none needs any more, so that `needed` more bytes fit. `kept` are packs that stay, and
    /// so do those of models that were used lately; what `name` was before does not.
    ///
    /// # Errors
    /// `NoRoom`: then nothing was removed.
    pub(super) fn make_room(
        &self,
        name: &str,
        catalogue: &Catalogue,
        kept: &BTreeSet<String>,
        needed: ByteCount,
    ) -> Result<Vec<String>, WeightsError> {
        let models: Vec<&StoredModel> =
            catalogue.models.iter().map(|(model, _)| model).filter(|model| model.name != name).collect();
        let bytes_max = self.options.bytes_max;
        let (keep, now) = (self.options.keep, nanoseconds(SystemTime::now()));
        let rests = |model: &StoredModel| Duration::from_nanos(now.saturating_sub(model.used)) >= keep;
        let candidates: Vec<StoredModel> =
            models.iter().filter(|model| rests(model)).map(|model| (*model).clone()).collect();
        let lately = models.iter().filter(|model| !rests(model)).flat_map(|model| &model.packs);
        let mut kept: BTreeSet<String> = kept.iter().chain(lately).cloned().collect();
        let mut ours: BTreeMap<String, File> = BTreeMap::new();
        let (going, leaving) = loop {
            let going = make_room(&candidates, &catalogue.packs, &kept, needed.0, bytes_max.0)
                .ok_or(WeightsError::NoRoom { needed, bytes_max })?;
            let staying = models.iter().filter(|model| !going.contains(&model.name));
            let used: BTreeSet<&String> = staying.flat_map(|model| &model.packs).chain(&kept).collect();
            let leaving: Vec<String> =
                catalogue.packs.keys().filter(|name| !used.contains(name)).cloned().collect();
            let mut read = BTreeSet::new();
            for name in &leaving {
                if ours.contains_key(name) {
                    continue;
                }
                match alone(&self.pack(name))? {
                    Some(file) => drop(ours.insert(name.clone(), file)),
                    None => drop(read.insert(name.clone())),
                }
            }
            if read.is_empty() {
                break (going, leaving);
            }
            kept.extend(read);
        };
        for name in &going {
            remove(&self.model(name))?;
        }
        for name in &leaving {
            remove(&self.pack(name))?;
        }
        Ok(going)
    }

    /// What the directory shall remember of `needed` more bytes that are written now; none where nothing is bounded.
    ///
    /// # Errors
    /// `TooSoon`, `Io`.
    pub(super) fn wear(&self, needed: ByteCount) -> Result<Option<Wear>, WeightsError> {
        let Some(per_hour) = self.options.write_bytes_per_hour else { return Ok(None) };
        let path = self.root.join(WEAR);
        let known: Wear = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Wear::default(),
            Err(error) => return Err(io_error("cannot read", &path)(error).into()),
        };
        let now_s = nanoseconds(SystemTime::now()) / 1_000_000_000;
        // A clock that was set back makes nothing good, and takes no longer than one that was not.
        let known = Wear { at_s: known.at_s.min(now_s), ..known };
        let wait = |wait_s| WeightsError::TooSoon { needed, wait: Duration::from_secs(wait_s) };
        known.add(needed.0, per_hour.0, now_s).map(Some).map_err(wait)
    }

    /// Has the directory remember what is about to be written, whatever becomes of it.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn remember(&self, wear: Wear) -> Result<(), WeightsError> {
        let path = self.root.join(WEAR);
        let bytes =
            serde_json::to_vec(&wear).map_err(|error| io_error("cannot write", &path)(error.into()))?;
        Ok(write_out(&path.with_extension(UNFINISHED), &path, &bytes)?)
    }
}

/// A pack that nobody reads, and nobody will while this is open; none where somebody does, or it is gone meanwhile.
///
/// # Errors
/// `Io`.
pub(super) fn alone(path: &Path) -> Result<Option<File>, DiskError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("cannot open", path)(error)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(io_error("cannot lock", path)(errno.into())),
    }
}

/// A pack that stays on the disk while this is open.
///
/// # Errors
/// The system's; `NotFound` where it was removed meanwhile.
pub(super) fn with_others(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    let mut tries = 0;
    while let Err(errno) = flock(&file, FlockOperation::NonBlockingLockShared) {
        tries += 1;
        if errno != Errno::WOULDBLOCK || tries == READ_TRIES {
            return Err(errno.into());
        }
        thread::sleep(READ_PAUSE);
    }
    if file.metadata()?.nlink() == 0 { Err(io::ErrorKind::NotFound.into()) } else { Ok(file) }
}
