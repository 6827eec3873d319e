//! What a remote speaks: a few blocking calls on one connection, each with a time by which it is over.
//!
//! Apart because there are three of them (S3, Redis, a directory) behind the same queue, retries and checks. A wire believes
//! nothing it reads: lengths are compared with what fits before anything is read.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::envelope::HEAD_BYTES;

/// A line of a protocol is never longer.
const LINE_MAX: usize = 16 << 10;
/// What a remote says of an error is never told at greater length.
const SAID_MAX: usize = 200;
/// So many addresses of a name are tried.
const ADDRESSES_MAX: usize = 8;
/// The least that a socket waits: zero would be forever.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// A connection that nothing passed over for so long may be forgotten by what lies between, without a word.
const IDLE_MAX: Duration = Duration::from_secs(20);

/// Why something was not done.
#[derive(Debug)]
pub(super) enum WireError {
    /// Worth another try.
    Passing(String),
    /// Not in time; worth another try if there is time.
    Late,
    /// Another try would end the same way.
    Refused(String),
    /// So many bytes do not fit in the memory that was given.
    TooLong(u64),
}

/// What a remote says, fit for a line of a log.
pub(super) fn told(said: &str) -> String {
    let plain = said.chars().map(|one| if one.is_control() { ' ' } else { one });
    plain.take(SAID_MAX).collect::<String>().trim_end().to_owned()
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passing(reason) | Self::Refused(reason) => f.write_str(reason),
            Self::Late => f.write_str("no answer in time"),
            Self::TooLong(bytes) => write!(f, "{bytes} bytes do not fit"),
        }
    }
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::Late,
            _ => Self::Passing(error.to_string()),
        }
    }
}

/// Something that keeps objects by name. An object is a head and a body.
pub(super) trait Wire: Send {
    /// Reads an object, its first bytes to `head`, the others to `body`. Its length, or none if there is no such object.
    fn get(
        &mut self,
        name: &str,
        head: &mut [u8; HEAD_BYTES],
        body: &mut [u8],
        until: Instant,
    ) -> Result<Option<u64>, WireError>;

    /// Writes an object, or writes over it.
    fn put(
        &mut self,
        name: &str,
        head: &[u8; HEAD_BYTES],
        body: &[u8],
        until: Instant,
    ) -> Result<(), WireError>;

    /// Whether there is such an object.
    fn has(&mut self, name: &str, until: Instant) -> Result<bool, WireError>;

    /// Deletes an object; it may not be there.
    fn delete(&mut self, name: &str, until: Instant) -> Result<(), WireError>;
}

/// What is left until then; an error if nothing is.
pub(super) fn left(until: Instant) -> Result<Duration, WireError> {
    let left = until.saturating_duration_since(Instant::now());
    if left < WAIT_MIN { Err(WireError::Late) } else { Ok(left) }
}

/// A connection whose every wait ends in time.
#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
    buffer: Vec<u8>,
    at: usize,
    /// When something was read last.
    used: Instant,
}

impl Link {
    /// Connects to `host:port`, whichever of its addresses answers.
    pub(super) fn connect(address: &str, until: Instant) -> Result<Self, WireError> {
        // The system's resolver has time limits of its own.
        let addresses = address
            .to_socket_addrs()
            .map_err(|error| WireError::Passing(format!("cannot find {address}: {error}")))?;
        let addresses: Vec<_> = addresses.take(ADDRESSES_MAX).collect();
        Self::connect_any(&addresses, until)
    }

    /// Each address has an equal part of the time, so that one that swallows packets leaves some to the others.
    fn connect_any(addresses: &[SocketAddr], until: Instant) -> Result<Self, WireError> {
        let mut last = WireError::Passing("its name has no address".to_owned());
        for (to_go, address) in (1..=u32::try_from(addresses.len()).unwrap_or(1)).rev().zip(addresses) {
            match TcpStream::connect_timeout(address, (left(until)? / to_go).max(WAIT_MIN)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(Self { stream, buffer: Vec::new(), at: 0, used: Instant::now() });
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => last = WireError::Late,
                Err(error) => last = WireError::Passing(format!("cannot connect to {address}: {error}")),
            }
        }
        Err(last)
    }

    /// Whether it may be used again: nothing may be left of an answer, or it would be taken for the next one.
    pub(super) fn is_fresh(&self) -> bool {
        self.at == self.buffer.len() && self.used.elapsed() < IDLE_MAX
    }

    pub(super) fn send(&mut self, parts: &[&[u8]], until: Instant) -> Result<(), WireError> {
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                self.stream.set_write_timeout(Some(left(until)?))?;
                match self.stream.write(rest) {
                    Ok(0) => return Err(WireError::Passing("the connection takes no more".to_owned())),
                    Ok(written) => rest = &rest[written..],
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    fn read_some(&mut self, place: &mut [u8], until: Instant) -> Result<usize, WireError> {
        loop {
            self.stream.set_read_timeout(Some(left(until)?))?;
            match self.stream.read(place) {
                Ok(0) => return Err(WireError::Passing("the connection was closed".to_owned())),
                Ok(read) => {
                    self.used = Instant::now();
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads until `end` is there: what comes before it and the end itself.
    pub(super) fn read_through(&mut self, end: &[u8], until: Instant) -> Result<Vec<u8>, WireError> {
        loop {
            let unread = &self.buffer[self.at..];
            if let Some(found) = unread.windows(end.len()).position(|window| window == end) {
                let line = unread[..found + end.len()].to_vec();
                self.at += line.len();
                return Ok(line);
            }
            if unread.len() > LINE_MAX {
                return Err(WireError::Passing("an answer without an end".to_owned()));
            }
            let mut more = [0; 4096];
            let read = self.read_some(&mut more, until)?;
            self.buffer.drain(..self.at);
            self.at = 0;
            self.buffer.extend_from_slice(&more[..read]);
        }
    }

    pub(super) fn read_exact(&mut self, place: &mut [u8], until: Instant) -> Result<(), WireError> {
        let ready = (self.buffer.len() - self.at).min(place.len());
        place[..ready].copy_from_slice(&self.buffer[self.at..self.at + ready]);
        self.at += ready;
        let mut done = ready;
        while done < place.len() {
            done += self.read_some(&mut place[done..], until)?;
        }
        Ok(())
    }

    /// Reads an object of `bytes` to where it goes. What does not fit is not read: the connection is of no use then.
    pub(super) fn read_object(
        &mut self,
        bytes: u64,
        head: &mut [u8; HEAD_BYTES],
        body: &mut [u8],
        until: Instant,
    ) -> Result<(), WireError> {
        let too_long = || WireError::TooLong(bytes.saturating_sub(HEAD_BYTES as u64));
        let bytes = usize::try_from(bytes).map_err(|_| too_long())?;
        let in_head = bytes.min(HEAD_BYTES);
        let place = body.get_mut(..bytes - in_head).ok_or_else(too_long)?;
        self.read_exact(&mut head[..in_head], until)?;
        self.read_exact(place, until)
    }

    /// Reads and forgets.
    pub(super) fn skip(&mut self, mut bytes: u64, until: Instant) -> Result<(), WireError> {
        let mut place = [0; 4096];
        while bytes > 0 {
            let length = usize::try_from(bytes.min(4096)).unwrap_or(4096);
            self.read_exact(&mut place[..length], until)?;
            bytes -= length as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use rustix::net::{AddressFamily, SocketAddrV4, SocketType, bind, getsockname, listen, socket};

    use super::*;

    #[test]
    fn an_address_that_swallows_packets_leaves_time_to_the_others() {
        // One whose queue is full: more connections to it are not answered.
        let full = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        bind(&full, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).expect("a port");
        listen(&full, 0).expect("it listens");
        let address = getsockname(&full).expect("an address");
        let address: SocketAddr = SocketAddrV4::try_from(address).expect("of IPv4").into();
        let mut fillers = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
            fillers.push(stream);
            assert!(fillers.len() < 100, "its queue is never full");
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let good = listener.local_addr().expect("an address");
        let until = Instant::now() + Duration::from_secs(30);
        let link = Link::connect_any(&[address, good], until).expect("the second one answers");
        assert_eq!(link.stream.peer_addr().expect("an address"), good);
        drop((listener, fillers));
        let until = Instant::now() + Duration::from_millis(20);
        assert!(matches!(Link::connect_any(&[address], until), Err(WireError::Late)));
        assert!(matches!(Link::connect_any(&[], until), Err(WireError::Passing(_))));
    }

    #[test]
    fn what_is_told_is_short_and_in_one_line() {
        assert_eq!(told("one\r\nERROR two\u{1b}[31m\n"), "one  ERROR two [31m");
        assert_eq!(told(&"x".repeat(9999)).len(), SAID_MAX);
    }
}
