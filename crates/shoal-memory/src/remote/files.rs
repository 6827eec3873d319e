//! A directory that others may share: objects as files.
//!
//! Apart because it is the plainest object store: a mounted share, or a test. A file takes its name when it is whole and
//! written out. File systems have no deadlines: a share that hangs holds threads of this tier, and nothing else.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Instant;

use super::envelope::HEAD_BYTES;
use super::wire::{Wire, WireError, left};

/// See the module.
pub(super) struct Files {
    path: PathBuf,
    /// Tells apart what several threads and processes are writing.
    mark: u64,
    count: u64,
}

impl Files {
    pub(super) fn new(path: PathBuf, mark: u64) -> Self {
        Self { path, mark, count: 0 }
    }

    /// Others write here too: what is no file would be waited for, or lead elsewhere.
    fn open(&self, name: &str) -> Result<Option<File>, WireError> {
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
        match OpenOptions::new().read(true).custom_flags(flags).open(self.path.join(name)) {
            Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
            Ok(_) => Err(WireError::Refused(format!("{name} is no file"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
                Err(WireError::Refused(format!("{name} is no file")))
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Wire for Files {
    fn get(
        &mut self,
        name: &str,
        head: &mut [u8; HEAD_BYTES],
        body: &mut [u8],
        until: Instant,
    ) -> Result<Option<u64>, WireError> {
        let Some(mut file) = self.open(name)? else { return Ok(None) };
        left(until)?;
        let bytes = file.metadata()?.len();
        let in_head = usize::try_from(bytes).unwrap_or(usize::MAX).min(HEAD_BYTES);
        let rest = bytes - in_head as u64;
        let place = usize::try_from(rest).ok().and_then(|rest| body.get_mut(..rest));
        let place = place.ok_or(WireError::TooLong(rest))?;
        file.read_exact(&mut head[..in_head])?;
        file.read_exact(place)?;
        Ok(Some(bytes))
    }

    fn put(
        &mut self,
        name: &str,
        head: &[u8; HEAD_BYTES],
        body: &[u8],
        until: Instant,
    ) -> Result<(), WireError> {
        left(until)?;
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        self.count += 1;
        let part = path.with_extension(format!("{:016x}-{}.part", self.mark, self.count));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        let written = file
            .write_all(head)
            .and_then(|()| file.write_all(body))
            .and_then(|()| file.sync_data())
            .and_then(|()| fs::rename(&part, &path))
            // The name too is to be there after the power failed.
            .and_then(|()| path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all()));
        written.map_err(|error| {
            // What is left of it is nobody's.
            let _ = fs::remove_file(&part);
            error.into()
        })
    }

    fn has(&mut self, name: &str, _until: Instant) -> Result<bool, WireError> {
        self.open(name).map(|file| file.is_some())
    }

    fn delete(&mut self, name: &str, _until: Instant) -> Result<(), WireError> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn what_others_put_in_a_files_place_is_refused() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = |name: &str| folder.path().join(name);
        mknodat(CWD, path("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
        fs::write(path("file"), [1; 200]).expect("a file");
        std::os::unix::fs::symlink(path("file"), path("link")).expect("a link");
        fs::create_dir(path("directory")).expect("a directory");
        let (mut files, until) =
            (Files::new(folder.path().to_owned(), 1), Instant::now() + Duration::from_mins(1));
        for name in ["pipe", "link", "directory"] {
            let read = files.get(name, &mut [0; HEAD_BYTES], &mut [0; 100], until);
            assert!(matches!(read, Err(WireError::Refused(_))), "{name}: {read:?}");
            assert!(matches!(files.has(name, until), Err(WireError::Refused(_))), "{name}");
        }
        assert!(matches!(files.get("file", &mut [0; HEAD_BYTES], &mut [0; 100], until), Ok(Some(200))));
        assert!(matches!(files.get("none", &mut [0; HEAD_BYTES], &mut [0; 100], until), Ok(None)));
    }
}
