//! The directory of one disk: whose it is, of which version, and that nobody else has it.
//!
//! Apart because it comes before the log, and because nothing here may be destroyed by mistake: a directory that is not
//! plainly ours, of this version, and free, is refused and left as it is.
//!
//! ```text
//! DIRECTORY/         0700
//!   tier.json        format, segment length, the secret of all checksums, whether it is encrypted; written once
//!   lock             locked by the process that has the directory
//!   log              the segments
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use shoal_core::store::format::{Secret, UNIT, VERSION};

use super::error::DiskError;
use super::file::LogFile;
use super::medium::Medium;
use super::ring::Ring;
use super::seal::{self, DiskKey};
use super::threads::Threads;

const MARKER: &str = "tier.json";
const MARKER_NEW: &str = "tier.json.new";
const LOCK: &str = "lock";
const LOG: &str = "log";
/// What blocks are encrypted with, where they are.
const CIPHER: &str = "AES-256-GCM";
/// Longer is no number of a process.
const PID_BYTES_MAX: u64 = 16;
/// Longer is no marker.
const MARKER_BYTES_MAX: u64 = 4096;

/// How requests reach the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// `io_uring` where the kernel allows it, else threads.
    #[default]
    Auto,
    /// Threads.
    Threads,
}

/// A directory that is ours for as long as this lives.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    secret: Secret,
    segment_bytes: u64,
    _lock: File,
}

/// What the marker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Marker {
    secret: Secret,
    segment_bytes: u64,
    /// What the key that it is encrypted with makes of the secret; none where it is not.
    check: Option<u128>,
}

impl Marker {
    /// # Errors
    /// `Encrypted`, `NotEncrypted`, `OtherKey`.
    fn check_key(&self, path: &Path, key: Option<&DiskKey>) -> Result<(), DiskError> {
        let path = path.to_owned();
        match (self.check, key) {
            (None, None) => Ok(()),
            (Some(_), None) => Err(DiskError::Encrypted { path }),
            (None, Some(_)) => Err(DiskError::NotEncrypted { path }),
            (Some(check), Some(key)) if key.check(self.secret) == Some(check) => Ok(()),
            (Some(_), Some(_)) => Err(DiskError::OtherKey { path }),
        }
    }
}

pub(crate) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |error| DiskError::Io { doing, path, source: Arc::new(error) }
}

impl Directory {
    /// Takes a directory, making it where there is none. `segment_bytes` counts for a new one only.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub(super) fn take(path: &Path, segment_bytes: u64, key: Option<&DiskKey>) -> Result<Self, DiskError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io_error("cannot make the directory", path))?;
        // Looked at before the lock is made, so that what is not ours gets no file of ours.
        match read_marker(path)? {
            None => check_empty(path)?,
            Some(marker) => marker.check_key(path, key)?,
        }
        let lock = lock(path)?;
        let marker = match read_marker(path)? {
            Some(marker) => marker,
            None => write_marker(path, segment_bytes, key)?,
        };
        marker.check_key(path, key)?;
        Ok(Self {
            path: path.to_owned(),
            secret: marker.secret,
            segment_bytes: marker.segment_bytes,
            _lock: lock,
        })
    }

    pub(super) fn secret(&self) -> Secret {
        self.secret
    }

    pub(super) fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// The log, by the best means that this machine allows.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn medium(
        &self,
        engine: Engine,
        depth: usize,
        wants_direct: bool,
    ) -> Result<Box<dyn Medium>, DiskError> {
        let path = self.path.join(LOG);
        medium(&path, engine, depth, wants_direct).map_err(io_error("cannot open", &path))
    }
}

/// A file by the best means that this machine allows.
///
/// # Errors
/// The system's.
pub(crate) fn medium(
    path: &Path,
    engine: Engine,
    depth: usize,
    wants_direct: bool,
) -> io::Result<Box<dyn Medium>> {
    medium_of(LogFile::open(path, wants_direct)?, engine, depth)
}

/// [`medium`] of a file that is there, to be read alone.
///
/// # Errors
/// The system's.
pub(crate) fn medium_to_read(
    path: &Path,
    engine: Engine,
    depth: usize,
    wants_direct: bool,
) -> io::Result<Box<dyn Medium>> {
    medium_of(LogFile::open_to_read(path, wants_direct)?, engine, depth)
}

fn medium_of(
    (file, reason): (LogFile, Option<String>),
    engine: Engine,
    depth: usize,
) -> io::Result<Box<dyn Medium>> {
    let mut reasons: Vec<String> = reason.into_iter().collect();
    if engine == Engine::Auto {
        match Ring::new(file.clone(), depth, reasons.clone()) {
            Ok(ring) => return Ok(Box::new(ring)),
            Err(error) => {
                reasons.push(format!("io_uring is not to be had ({error}), so threads read and write"));
            }
        }
    }
    Ok(Box::new(Threads::new(file, depth, reasons)?))
}

/// A random number.
///
/// # Errors
/// `Io`.
pub(crate) fn random() -> Result<u64, DiskError> {
    let mut bytes = [0; 8];
    getrandom(&mut bytes, GetRandomFlags::empty()).map_err(|errno| {
        io_error("cannot get a random number from", Path::new("the system"))(errno.into())
    })?;
    Ok(u64::from_le_bytes(bytes))
}

/// Takes the lock of a directory, which is let go with the file.
///
/// # Errors
/// `InUse`, `Io`.
pub(crate) fn lock(path: &Path) -> Result<File, DiskError> {
    let lock_path = path.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(io_error("cannot open", &lock_path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {
            // For the message that others get; a full disk is no reason to go without.
            let said = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            if let Err(error) = said {
                tracing::debug!(%error, "the lock of a disk tier does not say whose it is");
            }
            Ok(file)
        }
        Err(Errno::WOULDBLOCK) => {
            let mut said = String::new();
            let read = file.take(PID_BYTES_MAX).read_to_string(&mut said);
            let pid = read.ok().and_then(|_| said.trim().parse().ok());
            Err(DiskError::InUse { path: path.to_owned(), pid })
        }
        Err(errno) => Err(io_error("cannot lock", &lock_path)(errno.into())),
    }
}

fn check_empty(path: &Path) -> Result<(), DiskError> {
    let cannot_list = || io_error("cannot list", path);
    for entry in fs::read_dir(path).map_err(cannot_list())? {
        let name = entry.map_err(cannot_list())?.file_name();
        // A disk that is formatted for this has the one folder.
        if ![LOCK, MARKER_NEW, "lost+found"].iter().any(|ours| name == *ours) {
            let entry = name.to_string_lossy().into_owned();
            return Err(DiskError::Foreign { path: path.to_owned(), entry });
        }
    }
    Ok(())
}

fn read_marker(path: &Path) -> Result<Option<Marker>, DiskError> {
    let path_of_marker = path.join(MARKER);
    let file = match File::open(&path_of_marker) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("cannot open", &path_of_marker)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MARKER_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error("cannot read", &path_of_marker))?;
    parse_marker(&bytes).map(Some).map_err(|problem| match problem {
        MarkerProblem::OtherVersion(found) => {
            DiskError::OtherVersion { path: path.to_owned(), found, ours: VERSION }
        }
        MarkerProblem::Damaged(reason) => {
            DiskError::Damaged { path: path_of_marker, reason: reason.to_owned() }
        }
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MarkerProblem {
    OtherVersion(u64),
    Damaged(&'static str),
}

fn parse_marker(bytes: &[u8]) -> Result<Marker, MarkerProblem> {
    use MarkerProblem::Damaged;
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|_| Damaged("it is not JSON"))?;
    let format = value["format"].as_u64().ok_or(Damaged("it has no format"))?;
    if format != u64::from(VERSION) {
        return Err(MarkerProblem::OtherVersion(format));
    }
    let segment_bytes = value["segment_bytes"].as_u64().ok_or(Damaged("it has no segment_bytes"))?;
    let secret = value["secret"].as_str().and_then(|text| u128::from_str_radix(text, 16).ok());
    let secret = Secret(secret.ok_or(Damaged("it has no secret"))?);
    if segment_bytes < 16 * UNIT || segment_bytes % UNIT != 0 || segment_bytes > 1 << 40 {
        return Err(Damaged("its segment_bytes are impossible"));
    }
    let check = match &value["encrypted"] {
        serde_json::Value::Null => None,
        encrypted => {
            let check = encrypted["check"].as_str().and_then(|text| u128::from_str_radix(text, 16).ok());
            let is_known = encrypted["cipher"].as_str() == Some(CIPHER);
            Some(check.filter(|_| is_known).ok_or(Damaged("it does not say how it is encrypted"))?)
        }
    };
    Ok(Marker { secret, segment_bytes, check })
}

fn write_marker(path: &Path, segment_bytes: u64, key: Option<&DiskKey>) -> Result<Marker, DiskError> {
    let (new, marker) = (path.join(MARKER_NEW), path.join(MARKER));
    let mut random = [0; 16];
    getrandom(&mut random, GetRandomFlags::empty())
        .map_err(|errno| io_error("cannot make a secret for", path)(errno.into()))?;
    let secret = Secret(u128::from_le_bytes(random));
    let check = match key {
        None => None,
        Some(key) => Some(key.check(secret).ok_or_else(seal::no_cipher)?),
    };
    let encrypted =
        check.map(|check| serde_json::json!({"cipher": CIPHER, "check": format!("{check:032x}")}));
    let value = serde_json::json!({
        "format": VERSION,
        "segment_bytes": segment_bytes,
        "secret": format!("{:032x}", secret.0),
        "encrypted": encrypted,
        "about": "the disk tier of shoal: KV cache that can be computed again",
    });
    write_out(&new, &marker, format!("{value:#}\n").as_bytes())?;
    Ok(Marker { secret, segment_bytes, check })
}

/// Writes a file under another name and gives it its own when all of it is on the disk: after a crash it is there, whole, or
/// not at all.
///
/// # Errors
/// `Io`.
pub(crate) fn write_out(new: &Path, path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(new)
        .map_err(io_error("cannot make", new))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_error("cannot write", new))?;
    give_name(new, path)
}

/// Gives a file that is on the disk its name, for good.
///
/// # Errors
/// `Io`.
pub(crate) fn give_name(new: &Path, path: &Path) -> Result<(), DiskError> {
    fs::rename(new, path).map_err(io_error("cannot name", path))?;
    let directory = path.parent().unwrap_or(path);
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(io_error("cannot write out", directory))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    const SEGMENT: u64 = 1 << 20;

    #[test]
    fn a_directory_is_made_once_and_had_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let directory = Directory::take(&path, SEGMENT, None).unwrap();
        let secret = directory.secret();
        let error = Directory::take(&path, SEGMENT, None).unwrap_err();
        let own = std::process::id();
        assert!(matches!(error, DiskError::InUse { pid: Some(pid), .. } if pid == own), "{error:?}");
        assert!(error.to_string().contains(&format!("this very process ({own})")), "{error}");
        for (said, told) in
            [("1\n", "another process (1);"), ("what\n", "another process;"), ("", "another process;")]
        {
            fs::write(path.join(LOCK), said).unwrap();
            let error = Directory::take(&path, SEGMENT, None).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
        drop(directory);
        let directory = Directory::take(&path, 2 * SEGMENT, None).unwrap();
        assert!(directory.secret() == secret && directory.segment_bytes() == SEGMENT, "as it was made");
        directory.medium(Engine::Auto, 4, true).unwrap();
        let mode = |name: &str| fs::metadata(path.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("."), 0o700);
        for name in [MARKER, LOCK, LOG] {
            assert_eq!(mode(name), 0o600, "{name}");
        }
    }

    #[test]
    fn what_is_not_ours_stays_as_it_is() {
        type Case = (&'static str, &'static [u8], fn(&DiskError) -> bool);
        let cases: [Case; 5] = [
            ("tier.json", br#"{"format": 2, "what": "ever"}"#, |error| {
                matches!(error, DiskError::OtherVersion { found: 2, .. })
            }),
            ("tier.json", b"{", |error| matches!(error, DiskError::Damaged { .. })),
            ("tier.json", br#"{"format": 1, "segment_bytes": 5, "secret": "ff"}"#, |error| {
                matches!(error, DiskError::Damaged { .. })
            }),
            ("tier.json", br#"{"format": 1, "segment_bytes": 1048576, "secret": "x"}"#, |error| {
                matches!(error, DiskError::Damaged { .. })
            }),
            ("diary.txt", b"mine", |error| matches!(error, DiskError::Foreign { .. })),
        ];
        for (name, bytes, is_right) in cases {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join(name), bytes).unwrap();
            let error = Directory::take(folder.path(), SEGMENT, None).unwrap_err();
            assert!(is_right(&error) && !error.is_passing(), "{error}");
            let names: Vec<_> =
                fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, [name], "nothing was added");
            assert_eq!(fs::read(folder.path().join(name)).unwrap(), bytes);
        }
    }

    proptest! {
        #[test]
        fn any_marker_is_understood_or_refused(
            noise in proptest::collection::vec(any::<u8>(), 0..200),
            at in 0..200_usize,
            byte in any::<u8>(),
            bytes in any::<u64>(),
        ) {
            let possible = 16 * UNIT..=1 << 40;
            let _ = parse_marker(&noise);
            let good = format!(r#"{{"format": 1, "segment_bytes": {bytes}, "secret": "{:032x}"}}"#, 7);
            if let Ok(marker) = parse_marker(good.as_bytes()) {
                prop_assert!(marker.segment_bytes == bytes && possible.contains(&bytes));
            }
            let mut changed = good.into_bytes();
            let at = at % changed.len();
            changed[at] = byte;
            if let Ok(marker) = parse_marker(&changed) {
                prop_assert!(possible.contains(&marker.segment_bytes));
            }
        }
    }

    #[test]
    fn a_directory_is_had_with_its_own_key_only() {
        type Case<'a> = (&'a Path, Option<&'a DiskKey>, fn(&DiskError) -> bool);
        let folder = tempfile::tempdir().unwrap();
        let (plain, sealed) = (folder.path().join("plain"), folder.path().join("sealed"));
        let (key, other) = (DiskKey::new([1; 32]), DiskKey::new([2; 32]));
        drop(Directory::take(&plain, SEGMENT, None).unwrap());
        drop(Directory::take(&sealed, SEGMENT, Some(&key)).unwrap());
        let marker = fs::read(sealed.join(MARKER)).unwrap();
        let cases: [Case<'_>; 3] = [
            (&plain, Some(&key), |error| matches!(error, DiskError::NotEncrypted { .. })),
            (&sealed, None, |error| matches!(error, DiskError::Encrypted { .. })),
            (&sealed, Some(&other), |error| matches!(error, DiskError::OtherKey { .. })),
        ];
        for (path, key, is_right) in cases {
            let error = Directory::take(path, SEGMENT, key).unwrap_err();
            assert!(is_right(&error) && !error.is_passing(), "{error}");
            assert!(error.to_string().contains("left as it is"), "{error}");
        }
        assert_eq!(fs::read(sealed.join(MARKER)).unwrap(), marker);
        drop(Directory::take(&sealed, SEGMENT, Some(&key)).unwrap());
        Directory::take(&plain, SEGMENT, None).unwrap();

        // Encrypted in a way of the future.
        let text = String::from_utf8(marker).unwrap().replace(CIPHER, "other");
        fs::write(sealed.join(MARKER), text).unwrap();
        let error = Directory::take(&sealed, SEGMENT, Some(&key)).unwrap_err();
        assert!(matches!(error, DiskError::Damaged { .. }), "{error}");
    }

    #[test]
    fn a_start_that_was_cut_short_is_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(MARKER_NEW), b"{").unwrap();
        fs::write(folder.path().join(LOCK), b"").unwrap();
        Directory::take(folder.path(), SEGMENT, None).unwrap();
    }
}
