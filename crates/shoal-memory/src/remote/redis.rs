//! Redis, Valkey and whatever speaks their protocol (RESP, version 2).
//!
//! Apart because it is one protocol: five commands, each an array of byte strings, each with one answer.

use std::fmt;
use std::time::{Duration, Instant};

use super::envelope::HEAD_BYTES;
use super::wire::{Link, Wire, WireError};

/// Where a Redis is.
#[derive(Clone)]
pub struct RedisSpec {
    /// `host:port`.
    pub address: String,
    /// User and password; the user may be empty.
    pub login: Option<(String, String)>,
    /// The database's number.
    pub database: u32,
    /// What all names begin with.
    pub prefix: String,
    /// After how long a block is forgotten there; none for as long as Redis likes.
    pub keep: Option<Duration>,
}

impl fmt::Debug for RedisSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSpec")
            .field("address", &self.address)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

enum Answer {
    Text,
    Number(i64),
    /// A string of so many bytes, which are still to be read; none for nothing.
    Bytes(Option<u64>),
}

/// See the module.
pub(super) struct Redis {
    spec: RedisSpec,
    link: Option<Link>,
}

impl Redis {
    pub(super) fn new(spec: RedisSpec) -> Self {
        Self { spec, link: None }
    }

    fn name(&self, name: &str) -> Vec<u8> {
        format!("{}{name}", self.spec.prefix).into_bytes()
    }

    /// Sends a command on a connection that may be new, and reads the first line of its answer.
    fn command(
        &mut self,
        words: &[&[u8]],
        body: Option<[&[u8]; 2]>,
        until: Instant,
    ) -> Result<(Link, Answer), WireError> {
        if let Some(mut link) = self.link.take().filter(Link::is_fresh) {
            // One that was kept may have been closed meanwhile: then it is as if there had been none.
            match ask(&mut link, words, body, until) {
                Err(WireError::Passing(_)) => {}
                other => return other.map(|answer| (link, answer)),
            }
        }
        let mut link = Link::connect(&self.spec.address, until)?;
        if let Some((user, password)) = &self.spec.login {
            let all: [&[u8]; 3] = [b"AUTH", user.as_bytes(), password.as_bytes()];
            let short: [&[u8]; 2] = [b"AUTH", password.as_bytes()];
            ask(&mut link, if user.is_empty() { &short } else { &all }, None, until)?;
        }
        if self.spec.database != 0 {
            ask(&mut link, &[b"SELECT", self.spec.database.to_string().as_bytes()], None, until)?;
        }
        let answer = ask(&mut link, words, body, until)?;
        Ok((link, answer))
    }
}

/// `body` is the last word, in two parts.
fn ask(
    link: &mut Link,
    words: &[&[u8]],
    body: Option<[&[u8]; 2]>,
    until: Instant,
) -> Result<Answer, WireError> {
    let mut command = format!("*{}\r\n", words.len() + usize::from(body.is_some())).into_bytes();
    for word in words {
        command.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        command.extend_from_slice(word);
        command.extend_from_slice(b"\r\n");
    }
    if let Some([head, rest]) = body {
        command.extend_from_slice(format!("${}\r\n", head.len() + rest.len()).as_bytes());
        link.send(&[&command, head, rest, b"\r\n"], until)?;
    } else {
        link.send(&[&command], until)?;
    }
    let said = link.read_through(b"\r\n", until)?;
    let text = String::from_utf8_lossy(said.get(1..said.len() - 2).unwrap_or_default()).into_owned();
    let number = || text.parse::<i64>().map_err(|_| strange(&said));
    match said[0] {
        b'+' => Ok(Answer::Text),
        b':' => Ok(Answer::Number(number()?)),
        b'$' => Ok(Answer::Bytes(u64::try_from(number()?).ok())),
        // Loading, busy, a replica that lags, out of memory: it passes. A wrong password does not.
        b'-' => Err(match text.split(' ').next() {
            Some("NOAUTH" | "WRONGPASS" | "NOPERM" | "WRONGTYPE") => WireError::Refused(text),
            _ => WireError::Passing(text),
        }),
        _ => Err(strange(&said)),
    }
}

fn strange(line: &[u8]) -> WireError {
    let start = String::from_utf8_lossy(&line[..line.len().min(40)]).into_owned();
    WireError::Passing(format!("this is no answer of Redis: {start:?}"))
}

impl Wire for Redis {
    fn get(
        &mut self,
        name: &str,
        head: &mut [u8; HEAD_BYTES],
        body: &mut [u8],
        until: Instant,
    ) -> Result<Option<u64>, WireError> {
        let name = self.name(name);
        let (mut link, answer) = self.command(&[b"GET", &name], None, until)?;
        let Answer::Bytes(bytes) = answer else { return Err(strange(b"no string")) };
        if let Some(bytes) = bytes {
            link.read_object(bytes, head, body, until)?;
            let mut end = [0; 2];
            link.read_exact(&mut end, until)?;
            if end != *b"\r\n" {
                return Err(strange(&end));
            }
        }
        self.link = Some(link);
        Ok(bytes)
    }

    fn put(
        &mut self,
        name: &str,
        head: &[u8; HEAD_BYTES],
        body: &[u8],
        until: Instant,
    ) -> Result<(), WireError> {
        let name = self.name(name);
        // The value is the last word, so that its bytes are not copied; how long it is kept comes before it.
        let (link, answer) = match self.spec.keep {
            None => self.command(&[b"SET", &name], Some([head, body]), until)?,
            Some(keep) => {
                let seconds = keep.as_secs().max(1).to_string();
                self.command(&[b"SETEX", &name, seconds.as_bytes()], Some([head, body]), until)?
            }
        };
        let Answer::Text = answer else { return Err(strange(b"no word")) };
        self.link = Some(link);
        Ok(())
    }

    fn has(&mut self, name: &str, until: Instant) -> Result<bool, WireError> {
        let name = self.name(name);
        let (link, answer) = self.command(&[b"EXISTS", &name], None, until)?;
        let Answer::Number(count) = answer else { return Err(strange(b"no number")) };
        self.link = Some(link);
        Ok(count > 0)
    }

    fn delete(&mut self, name: &str, until: Instant) -> Result<(), WireError> {
        let name = self.name(name);
        let (link, answer) = self.command(&[b"DEL", &name], None, until)?;
        let Answer::Number(_) = answer else { return Err(strange(b"no number")) };
        self.link = Some(link);
        Ok(())
    }
}
