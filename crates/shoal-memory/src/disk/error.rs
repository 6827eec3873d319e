//! Why a directory is no disk tier.
//!
//! Apart from [`crate::MemoryError`]: these are told to whoever configures, before anything is served.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use shoal_core::bytes::ByteCount;

/// Why a disk tier was not opened. Whatever lies in the directory is as it was.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// Another tier has it, of another process or of this one.
    #[error("{} is the disk tier of {}; give each a directory of its own", path.display(), holder(*pid))]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process that has it, as far as it said.
        pid: Option<u32>,
    },
    /// Others can change what lies there.
    #[error("{} {reason}; it was left as it is: give a directory that its owner alone can write to", path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// In which way.
        reason: String,
    },
    /// Another version of Shoal made it.
    #[error(
        "{} was made by another version (format {found}, this one has {ours}); it was left as it is: remove it, or \
         give another directory",
        path.display()
    )]
    OtherVersion {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// Ours.
        ours: u32,
    },
    /// Something else lies there.
    #[error("{} holds {entry:?}, which is no disk tier's; give an empty directory", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// What was found.
        entry: String,
    },
    /// What describes the directory cannot be read.
    #[error("{} is damaged ({reason}); it was left as it is: remove it to start anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In which way.
        reason: String,
    },
    /// Its blocks are encrypted, and no key was given.
    #[error("{} is encrypted; name its key, or give another directory (it was left as it is)", path.display())]
    Encrypted {
        /// The directory.
        path: PathBuf,
    },
    /// A key was given, and its blocks are not encrypted.
    #[error(
        "{} holds blocks that are not encrypted, and a key is named; it was left as it is: remove it to start anew, or \
         name no key",
        path.display()
    )]
    NotEncrypted {
        /// The directory.
        path: PathBuf,
    },
    /// Its blocks are encrypted with another key.
    #[error(
        "{} is encrypted with another key; it was left as it is: name that key, or remove the directory to start anew",
        path.display()
    )]
    OtherKey {
        /// The directory.
        path: PathBuf,
    },
    /// There is no key in the file that is named.
    #[error(
        "no key in {}: {reason}; `openssl rand -hex 32` writes one, and only its owner should be able to read it",
        path.display()
    )]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// In which way.
        reason: String,
    },
    /// The options make no tier.
    #[error("disk {}: {reason}", path.display())]
    Options {
        /// The directory.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The cap leaves no room for two segments.
    #[error(
        "disk {}: {bytes} is too little: at least {bytes_min}, two segments", path.display()
    )]
    TooSmall {
        /// The directory.
        path: PathBuf,
        /// The cap.
        bytes: ByteCount,
        /// The least.
        bytes_min: ByteCount,
    },
    /// The system refused. The disk is set aside and tried again.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
}

/// Who has a directory, in words.
fn holder(pid: Option<u32>) -> String {
    match pid {
        Some(pid) if pid == std::process::id() => format!("this very process ({pid}) already"),
        Some(pid) => format!("another process ({pid})"),
        None => "another process".to_owned(),
    }
}

impl DiskError {
    /// Whether it is worth another try without anybody changing anything.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}
