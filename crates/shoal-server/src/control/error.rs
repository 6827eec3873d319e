//! What can go wrong on the control socket.

use std::path::PathBuf;
use std::time::Duration;

/// Why a connection, or the whole socket, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The socket cannot be made.
    #[error("the control socket {path} cannot be made: {source}")]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Reading or writing failed.
    #[error("the control socket failed: {0}")]
    Io(#[from] std::io::Error),
    /// A line is longer than the bound.
    #[error("a control message is longer than {bytes_max} bytes")]
    TooLong {
        /// The bound.
        bytes_max: usize,
    },
    /// A line is no message of this version.
    #[error("a control message cannot be understood: {source}; it begins {beginning:?}")]
    Malformed {
        /// Its first bytes.
        beginning: String,
        /// Why.
        source: serde_json::Error,
    },
    /// Nothing came, or could be sent, in time.
    #[error("{what} took longer than {allowed:?}")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// How long.
        allowed: Duration,
    },
    /// Whoever connected did not say hello first.
    #[error("the first control message was not a hello")]
    NoHello,
    /// Another version.
    #[error(
        "the worker speaks control protocol {theirs}, this server {ours}: install the same shoal for both"
    )]
    Version {
        /// Theirs.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// Another process than it says, or another user's.
    #[error("the process behind the connection is {actual}, it says it is {claimed}")]
    Impostor {
        /// What the hello says.
        claimed: u32,
        /// What the kernel says.
        actual: String,
    },
}
