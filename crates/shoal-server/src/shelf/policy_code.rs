//! The files that a policy in Python was read from, and whether they are what they were.
//!
//! Apart from [`super::policy_process`], which keeps the process: only the process knows its files, and only a reload asks
//! whether they have changed.

use std::path::PathBuf;
use std::time::SystemTime;

/// Files that are looked at; a policy has a few of its own.
const FILES_MAX: usize = 256;

/// When a file was last written, and its length. None where nobody knows that this is what was read.
type Stamp = Option<(SystemTime, u64)>;

/// A policy's own code, as its process has read it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Code(Vec<(PathBuf, Stamp)>);

impl Code {
    /// Of `files`, read by a process that began at `began`. What was written since may be newer than what it read.
    pub(super) fn of(files: Vec<PathBuf>, began: SystemTime) -> Self {
        let files = files.into_iter().take(FILES_MAX);
        Self(
            files
                .map(|file| {
                    let stamp = stamp(&file).filter(|(written, _)| *written < began);
                    (file, stamp)
                })
                .collect(),
        )
    }

    /// A file was written, replaced or removed. Asks the disk.
    pub(super) fn has_changed(&self) -> bool {
        self.0.iter().any(|(file, read)| read.is_none() || stamp(file) != *read)
    }
}

fn stamp(file: &std::path::Path) -> Stamp {
    let about = std::fs::metadata(file).ok()?;
    Some((about.modified().ok()?, about.len()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_written_since_it_was_read_counts() -> std::io::Result<()> {
        let scratch = tempfile::tempdir()?;
        let file = scratch.path().join("mine.py");
        std::fs::write(&file, "one")?;
        let began = SystemTime::now() + Duration::from_secs(5);
        let code = || Code::of(vec![file.clone()], began);
        let read = code();
        assert!(!Code::default().has_changed() && !read.has_changed());
        // As long as before, and as old as a copy may be.
        let log = std::fs::File::options().write(true).open(&file)?;
        log.set_modified(began - Duration::from_hours(1))?;
        assert!(read.has_changed());
        let read = code();
        std::fs::write(&file, "three")?;
        assert!(read.has_changed());
        assert!(
            Code::of(vec![file.clone()], SystemTime::UNIX_EPOCH).has_changed(),
            "it was written meanwhile"
        );
        let read = code();
        std::fs::remove_file(&file)?;
        assert!(read.has_changed());
        assert!(code().has_changed(), "it is not there");
        Ok(())
    }
}
