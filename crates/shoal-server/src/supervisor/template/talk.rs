//! What is said between the server and a template: one JSON object a line, bounded, files beside the orders.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// The longest line that a template may say.
const SAID_BYTES_MAX: usize = 16 << 10;
/// The longest order; `_LINE_BYTES_MAX` of python/shoal/worker/template.py.
const ORDER_BYTES_MAX: usize = 256 << 10;

/// Whom to fork.
#[derive(Debug, Serialize)]
pub(super) struct Order {
    /// Its number, which the answer bears.
    pub(super) fork: u64,
    pub(super) model: String,
    /// What `python -m shoal.worker` would be given.
    pub(super) args: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
}

/// What a template says.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Said {
    /// It has imported all, which took so long; it takes so much memory, shared with its children.
    Ready { bytes: u64, seconds: f64 },
    /// It cannot import what workers need, or cannot be what they are forked from then; and whether the next would neither.
    Failed { reason: String, lasting: bool },
    /// The child of an order, by number and start.
    Forked { fork: u64, pid: u32, start: u64 },
    /// Why there is none for this order; the next may have one.
    Refused { fork: u64, reason: String },
    /// Why there is none, and will be none for any other. It goes on telling how its children end.
    Unfit { fork: u64, reason: String },
    /// A child has ended and was waited for; its status as the system has it.
    Ended { pid: u32, status: i32 },
}

/// Both directions.
#[derive(Debug)]
pub(super) struct Talk {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    line: Vec<u8>,
}

impl Talk {
    pub(super) fn new(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader: BufReader::new(reader), writer, line: Vec::new() }
    }

    /// The next thing that it says; none once it is gone. May be dropped and called again: half a line is kept.
    ///
    /// # Errors
    /// It says what nobody understands.
    pub(super) async fn next(&mut self) -> std::io::Result<Option<Said>> {
        let room = (SAID_BYTES_MAX + 1).saturating_sub(self.line.len()) as u64;
        match (&mut self.reader).take(room).read_until(b'\n', &mut self.line).await {
            // It left without having read all.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            read => drop(read?),
        }
        if self.line.last() == Some(&b'\n') {
            let line = std::mem::take(&mut self.line);
            let said = serde_json::from_slice(&line);
            return said.map(Some).map_err(|error| Error::new(ErrorKind::InvalidData, error));
        }
        if self.line.len() > SAID_BYTES_MAX {
            let why = format!("a line is longer than {SAID_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::InvalidData, why));
        }
        Ok(None)
    }

    /// Say an order, with its files.
    ///
    /// # Errors
    /// It is too long, or the template is gone.
    pub(super) async fn say(&mut self, order: &Order, files: [BorrowedFd<'_>; 2]) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        if line.len() > ORDER_BYTES_MAX {
            let why = format!("an order of {} bytes is longer than {ORDER_BYTES_MAX}", line.len());
            return Err(Error::new(ErrorKind::InvalidInput, why));
        }
        // The files come with the first bytes.
        let sent = loop {
            self.writer.writable().await?;
            let socket = self.writer.as_ref();
            match socket.try_io(Interest::WRITABLE, || send_with(socket.as_fd(), &line, &files)) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                sent => break sent?,
            }
        };
        self.writer.write_all(&line[sent..]).await
    }
}

fn send_with(socket: BorrowedFd<'_>, line: &[u8], files: &[BorrowedFd<'_>]) -> std::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(Error::other("no room for descriptors"));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    Ok(sendmsg(socket, &[IoSlice::new(line)], &mut control, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn heard(bytes: &[u8]) -> std::io::Result<Option<Said>> {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(bytes).await.expect("written");
        drop(theirs);
        Talk::new(ours).next().await
    }

    #[tokio::test]
    async fn lines_are_read_whole_and_bounded() {
        let forked = heard(b"{\"say\":\"forked\",\"fork\":3,\"pid\":9,\"start\":12}\n").await;
        assert_eq!(forked.expect("read"), Some(Said::Forked { fork: 3, pid: 9, start: 12 }));
        assert_eq!(heard(b"").await.expect("read"), None);
        assert_eq!(heard(b"{\"say\":\"ended\",\"pid\":9").await.expect("read"), None, "it left in mid-line");
        for wrong in [
            &b"no JSON\n"[..],
            b"{\"say\":\"sings\"}\n",
            b"{\"say\":\"forked\",\"fork\":3,\"pid\":-9,\"start\":1}\n",
            b"{\"say\":\"forked\",\"fork\":3,\"pid\":4294967296,\"start\":1}\n",
            b"{\"say\":\"ended\",\"pid\":9,\"status\":0,\"more\":1}\n",
        ] {
            let error = heard(wrong).await.expect_err("not understood");
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{}", String::from_utf8_lossy(wrong));
        }
        let long = vec![b'x'; SAID_BYTES_MAX + 2];
        assert!(heard(&long).await.expect_err("too long").to_string().contains("longer than"));
    }

    #[tokio::test]
    async fn half_a_line_is_kept_for_the_next_call() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let mut talk = Talk::new(ours);
        theirs.write_all(b"{\"say\":\"ended\",\"pid\":").await.expect("written");
        let waited = tokio::time::timeout(std::time::Duration::from_millis(50), talk.next()).await;
        assert!(waited.is_err(), "half a line is none");
        theirs.write_all(b"7,\"status\":256}\n").await.expect("written");
        assert_eq!(talk.next().await.expect("read"), Some(Said::Ended { pid: 7, status: 256 }));
    }

    #[tokio::test]
    async fn an_order_that_is_too_long_is_not_sent() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let file = std::fs::File::open("/dev/null").expect("there");
        let order = Order {
            fork: 1,
            model: "ash".to_owned(),
            args: vec!["x".repeat(ORDER_BYTES_MAX)],
            env: BTreeMap::new(),
        };
        let error = Talk::new(ours).say(&order, [file.as_fd(), file.as_fd()]).await.expect_err("too long");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}
