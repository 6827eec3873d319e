//! The reading end of the control socket: bytes, and the files that come with them.
//!
//! Apart because a descriptor travels beside the bytes of a line (`SCM_RIGHTS`), and a reader that only reads bytes would
//! lose it. Files are kept in the order in which they came, few at a time: whoever hears the line takes its file.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Files that may wait for their lines. More than one would be a server that says something else than it sends.
const FILES_MAX: usize = 16;

/// A socket whose files are kept.
#[derive(Debug)]
pub(super) struct FileStream {
    socket: UnixStream,
    files: VecDeque<OwnedFd>,
}

impl FileStream {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, files: VecDeque::new() }
    }

    pub(super) const fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The file that came first and was not taken yet.
    pub(super) fn take_file(&mut self) -> Option<OwnedFd> {
        self.files.pop_front()
    }
}

impl Read for FileStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(&self.socket, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        if self.files.len() > FILES_MAX {
            return Err(io::Error::other("the server sent files that no line speaks of"));
        }
        Ok(received.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, IoSlice, Seek, Write};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    #[test]
    fn a_file_comes_with_its_line() {
        let (here, mut there) = UnixStream::pair().expect("sockets");
        let mut sent = tempfile::tempfile().expect("a file");
        sent.write_all(b"inside").expect("written");
        there.write_all(b"first\n").expect("sent");
        let files = [std::os::fd::AsFd::as_fd(&sent)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        sendmsg(&there, &[IoSlice::new(b"second\n")], &mut control, SendFlags::empty()).expect("sent");
        drop(there);
        let mut reader = BufReader::new(FileStream::new(here));
        let lines: Vec<_> = reader.by_ref().lines().collect::<Result<_, _>>().expect("lines");
        assert_eq!(lines, ["first", "second"]);
        let file = reader.get_mut().take_file().expect("a file");
        assert!(reader.get_mut().take_file().is_none());
        let (mut file, mut text) = (std::fs::File::from(file), String::new());
        file.rewind().expect("a file");
        file.read_to_string(&mut text).expect("text");
        assert_eq!(text, "inside");
    }
}
