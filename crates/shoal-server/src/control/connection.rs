//! One worker's connection, as two halves that carry whole messages.

use std::time::Duration;

use shoal_core::protocol::{FromServer, FromWorker, LINE_BYTES_MAX};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::ControlError;

/// What the worker says.
#[derive(Debug)]
pub struct Incoming {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(half: OwnedReadHalf) -> Self {
        Self { reader: BufReader::new(half), line: Vec::new() }
    }

    /// The next message; `None` once the worker closed. Cancel-safe: a line half read is kept for the next call.
    ///
    /// # Errors
    /// [`ControlError::TooLong`], [`ControlError::Malformed`], [`ControlError::Io`]; the connection is of no more use.
    pub async fn next(&mut self) -> Result<Option<FromWorker>, ControlError> {
        let room = (LINE_BYTES_MAX + 1).saturating_sub(self.line.len()) as u64;
        let mut bounded = (&mut self.reader).take(room);
        bounded.read_until(b'\n', &mut self.line).await?;
        if self.line.is_empty() {
            return Ok(None);
        }
        if self.line.last() != Some(&b'\n') {
            if self.line.len() > LINE_BYTES_MAX {
                return Err(ControlError::TooLong { bytes_max: LINE_BYTES_MAX });
            }
            // The worker went away in the middle of a line: what it meant to say is unknown.
            return Ok(None);
        }
        let line = std::mem::take(&mut self.line);
        serde_json::from_slice(&line).map(Some).map_err(|source| ControlError::Malformed {
            beginning: String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned(),
            source,
        })
    }
}

/// What the server says.
#[derive(Debug)]
pub struct Outgoing {
    writer: OwnedWriteHalf,
    deadline: Duration,
}

impl Outgoing {
    pub(super) const fn new(writer: OwnedWriteHalf, deadline: Duration) -> Self {
        Self { writer, deadline }
    }

    /// Say one thing.
    ///
    /// # Errors
    /// [`ControlError::Deadline`] when the worker does not read, [`ControlError::Io`]; the connection is of no more use.
    pub async fn say(&mut self, message: &FromServer) -> Result<(), ControlError> {
        let mut line = serde_json::to_vec(message)
            .map_err(|source| ControlError::Malformed { beginning: String::new(), source })?;
        line.push(b'\n');
        match tokio::time::timeout(self.deadline, self.writer.write_all(&line)).await {
            Ok(written) => Ok(written?),
            Err(_) => Err(ControlError::Deadline { what: "sending to a worker", allowed: self.deadline }),
        }
    }
}
