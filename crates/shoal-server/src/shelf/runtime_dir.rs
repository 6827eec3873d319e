//! Directories that are one server's own: for its sockets, and for the disk tier.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::ShelfError;
use crate::config::ServerConfig;

/// The longest path of a Unix socket on Linux, its end mark excluded.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The directory, held by a lock on a file in it. The lock goes with the process, however that ends.
#[derive(Debug)]
pub(super) struct RuntimeDir {
    _lock: File,
}

impl RuntimeDir {
    /// Makes the directories and takes the runtime directory.
    pub(super) fn take(config: &ServerConfig) -> Result<Self, ShelfError> {
        let longest = config.runtime_dir.join(format!("worker-{}.sock", config.models.len()));
        if longest.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(ShelfError::PathTooLong { path: longest, limit: SOCKET_PATH_BYTES_MAX });
        }
        for directory in [&config.runtime_dir, &config.log_dir] {
            make(directory)?;
        }
        std::fs::set_permissions(&config.runtime_dir, Permissions::from_mode(0o700))
            .map_err(|source| failed("cannot make private:", &config.runtime_dir, source))?;

        let lock = lock(&config.runtime_dir, |path, pid| ShelfError::InUse { path, pid })?;
        Ok(Self { _lock: lock })
    }
}

/// The directories of the disk tier, held in the same way: two servers would not know of each other's bytes there.
#[derive(Debug)]
pub(super) struct DiskDirs {
    _locks: Vec<File>,
}

impl DiskDirs {
    /// Makes them and takes them. One that cannot be had for another reason than a server is left to the workers, which
    /// set it aside, say why, and try it again.
    pub(super) fn take(config: &ServerConfig) -> Result<Self, ShelfError> {
        let mut locks = Vec::new();
        for disk in &config.disk {
            let taken = make(&disk.path).and_then(|()| lock(&disk.path, disk_in_use));
            match taken {
                Ok(lock) => locks.push(lock),
                Err(error @ ShelfError::DiskInUse { .. }) => return Err(error),
                Err(error) => tracing::warn!(%error, "a directory of the disk tier cannot be used now"),
            }
        }
        Ok(Self { _locks: locks })
    }
}

/// Locks a directory by a file in it, which says whose it is.
fn lock(directory: &Path, in_use: impl FnOnce(PathBuf, String) -> ShelfError) -> Result<File, ShelfError> {
    let path = directory.join("server.lock");
    let mut lock = OpenOptions::new()
        .create(true)
        .read(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| failed("cannot open", &path, source))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // Without the number the message is still clear.
            let _ = lock.read_to_string(&mut pid);
            let pid = if pid.trim().is_empty() { "unknown".to_owned() } else { pid.trim().to_owned() };
            return Err(in_use(directory.to_owned(), pid));
        }
        Err(TryLockError::Error(source)) => return Err(failed("cannot lock", &path, source)),
    }
    let write = |lock: &mut File| {
        lock.set_len(0)?;
        lock.rewind()?;
        writeln!(lock, "{}", std::process::id())
    };
    write(&mut lock).map_err(|source| failed("cannot write", &path, source))?;
    Ok(lock)
}

fn disk_in_use(path: PathBuf, pid: String) -> ShelfError {
    let is_own = pid == std::process::id().to_string();
    ShelfError::DiskInUse { path, pid, is_own }
}

fn make(directory: &Path) -> Result<(), ShelfError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| failed("cannot create the directory", directory, source))
}

fn failed(what: &'static str, path: &Path, source: std::io::Error) -> ShelfError {
    ShelfError::Io { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_directory_is_is_told() {
        let scratch = tempfile::tempdir().expect("scratch");
        let held = lock(scratch.path(), disk_in_use).expect("nobody has it");
        let error = lock(scratch.path(), disk_in_use).expect_err("it is taken");
        let own = std::process::id().to_string();
        assert!(
            matches!(&error, ShelfError::DiskInUse { pid, is_own: true, .. } if *pid == own),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(text.contains("this very server") && !text.contains("another"), "{text}");
        // What another process would have written there.
        std::fs::write(scratch.path().join("server.lock"), "1\n").expect("written");
        let error = lock(scratch.path(), disk_in_use).expect_err("it is taken");
        assert!(error.to_string().starts_with("another shoal server (process 1) keeps"), "{error}");
        drop(held);
        lock(scratch.path(), disk_in_use).expect("it is free again");
    }
}
