//! One worker's connection, as two halves that carry whole messages.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use shoal_core::protocol::{FromServer, FromWorker, LINE_BYTES_MAX};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader, Interest, ReadBuf};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::ControlError;

/// Files that may wait for their lines; a worker may not be lent more slabs than that.
const FILES_MAX: usize = 256;

/// The reading half, and the files that come beside its bytes, in their order.
#[derive(Debug)]
struct FileHalf {
    half: OwnedReadHalf,
    files: VecDeque<OwnedFd>,
}

fn receive(socket: BorrowedFd<'_>, into: &mut [u8], files: &mut VecDeque<OwnedFd>) -> std::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            files.extend(came);
        }
    }
    if files.len() > FILES_MAX {
        return Err(std::io::Error::other("the worker sent files that no line speaks of"));
    }
    Ok(received.bytes)
}

impl AsyncRead for FileHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let Self { half, files } = self.get_mut();
        loop {
            ready!(half.as_ref().poll_read_ready(cx))?;
            let into = buffer.initialize_unfilled();
            match half.as_ref().try_io(Interest::READABLE, || receive(half.as_ref().as_fd(), into, files)) {
                Ok(bytes) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

/// What the worker says.
#[derive(Debug)]
pub struct Incoming {
    reader: BufReader<FileHalf>,
    line: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(half: OwnedReadHalf) -> Self {
        let half = FileHalf { half, files: VecDeque::new() };
        Self { reader: BufReader::new(half), line: Vec::new() }
    }

    /// The file that came first and was not taken yet.
    pub fn take_file(&mut self) -> Option<OwnedFd> {
        self.reader.get_mut().files.pop_front()
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

    /// Say one thing that a file comes with.
    ///
    /// # Errors
    /// As [`say`](Self::say).
    pub async fn say_with(&mut self, message: &FromServer, file: BorrowedFd<'_>) -> Result<(), ControlError> {
        let line = encode(message)?;
        let send = async {
            // The file comes with the first bytes.
            let sent = loop {
                self.writer.writable().await?;
                let socket = self.writer.as_ref();
                match socket.try_io(Interest::WRITABLE, || send_with(socket.as_fd(), &line, file)) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    sent => break sent?,
                }
            };
            self.writer.write_all(&line[sent..]).await
        };
        match tokio::time::timeout(self.deadline, send).await {
            Ok(written) => Ok(written?),
            Err(_) => Err(ControlError::Deadline { what: "sending to a worker", allowed: self.deadline }),
        }
    }

    /// Say one thing.
    ///
    /// # Errors
    /// [`ControlError::Deadline`] when the worker does not read, [`ControlError::Io`]; the connection is of no more use.
    pub async fn say(&mut self, message: &FromServer) -> Result<(), ControlError> {
        let line = encode(message)?;
        match tokio::time::timeout(self.deadline, self.writer.write_all(&line)).await {
            Ok(written) => Ok(written?),
            Err(_) => Err(ControlError::Deadline { what: "sending to a worker", allowed: self.deadline }),
        }
    }
}

fn encode(message: &FromServer) -> Result<Vec<u8>, ControlError> {
    let mut line = serde_json::to_vec(message)
        .map_err(|source| ControlError::Malformed { beginning: String::new(), source })?;
    line.push(b'\n');
    Ok(line)
}

fn send_with(socket: BorrowedFd<'_>, line: &[u8], file: BorrowedFd<'_>) -> std::io::Result<usize> {
    let files = [file];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(std::io::Error::other("no room for a descriptor"));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    Ok(sendmsg(socket, &[IoSlice::new(line)], &mut control, flags)?)
}
