//! Room for a pack: which models go, and which packs are free to.
//!
//! Apart because the cap is of what the disk holds, and a file that somebody reads stays there whatever its name: whoever reads
//! a pack has it locked with others, and none is removed but by who has it locked alone. What is refused counts as there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use shoal_core::bytes::ByteCount;
use shoal_core::store::weights::{StoredModel, make_room};

use super::{Catalogue, WeightStore, WeightsError, remove};
use crate::disk::DiskError;
use crate::disk::directory::io_error;

/// How often, and after what pause, a reader tries again while somebody sees whether a pack may go: a moment's work.
const READ_TRIES: u32 = 100;
const READ_PAUSE: Duration = Duration::from_millis(10);

impl WeightStore {
    /// Removes models, and the packs that none needs any more, so that `needed` more bytes fit. `kept` are packs that stay.
    ///
    /// # Errors
    /// `NoRoom`: then nothing was removed.
    pub(super) fn make_room(
        &self,
        catalogue: &Catalogue,
        kept: &BTreeSet<String>,
        needed: ByteCount,
    ) -> Result<Vec<String>, WeightsError> {
        let models: Vec<&StoredModel> = catalogue.models.iter().map(|(model, _)| model).collect();
        let bytes_max = self.options.bytes_max;
        let mut kept = kept.clone();
        let mut ours: BTreeMap<String, File> = BTreeMap::new();
        let (going, leaving) = loop {
            let candidates: Vec<StoredModel> = models.iter().map(|model| (*model).clone()).collect();
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
