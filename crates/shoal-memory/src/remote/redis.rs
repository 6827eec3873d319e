//! Redis, Valkey and whatever speaks their protocol (RESP, version 2).
//!
//! Apart because it is one protocol: five commands, each an array of byte strings, each with one answer.

use std::fmt;
use std::time::{Duration, Instant};

use super::envelope::HEAD_BYTES;
use super::wire::{Link, Wire, WireError, told};

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

#[derive(Debug)]
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
            ask(&mut link, if user.is_empty() { &short } else { &all }, None, until).map_err(no_login)?;
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
    understand(&link.read_through(b"\r\n", until)?)
}

/// What the first line of an answer means.
fn understand(line: &[u8]) -> Result<Answer, WireError> {
    let (mark, rest) = line.split_first().ok_or_else(|| strange(line))?;
    let text = String::from_utf8_lossy(rest.strip_suffix(b"\r\n").unwrap_or(rest));
    let number = || text.parse::<i64>().map_err(|_| strange(line));
    match mark {
        b'+' => Ok(Answer::Text),
        b':' => Ok(Answer::Number(number()?)),
        b'$' => Ok(Answer::Bytes(u64::try_from(number()?).ok())),
        // Loading, busy, a replica that lags, out of memory: it passes. A wrong password does not.
        b'-' => Err(match text.split(' ').next() {
            Some("NOAUTH" | "WRONGPASS" | "NOPERM" | "WRONGTYPE") => WireError::Refused(told(&text)),
            _ => WireError::Passing(told(&text)),
        }),
        _ => Err(strange(line)),
    }
}

/// Why there is no login: in one word, because what does not know the command says its arguments again.
fn no_login(error: WireError) -> WireError {
    let short = |reason: &str| {
        let word = reason.split(' ').next().unwrap_or_default();
        let is_word = word.chars().all(|one| one.is_ascii_uppercase());
        format!("the login is refused ({})", if is_word { word } else { "no answer of Redis" })
    };
    match error {
        WireError::Refused(reason) => WireError::Refused(short(&reason)),
        WireError::Passing(reason) => WireError::Passing(short(&reason)),
        other => other,
    }
}

fn strange(line: &[u8]) -> WireError {
    let start = told(&String::from_utf8_lossy(&line[..line.len().min(40)]));
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    const WAIT: Duration = Duration::from_mins(1);

    /// Answers all that is asked with the same bytes, on any number of connections; where.
    fn says(answer: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream.try_clone().expect("another handle"));
                let mut stream = stream;
                std::thread::spawn(move || {
                    let mut line = String::new();
                    while reader.read_line(&mut line).is_ok_and(|read| read > 0) {
                        // Commands are told apart by their first line; the words are passed over.
                        let words = line.trim_end().strip_prefix('*').map(str::parse::<usize>);
                        for _ in 0..words.map_or(0, |count| count.expect("a number")) {
                            line.clear();
                            reader.read_line(&mut line).expect("a length");
                            let length: usize = line.trim_end()[1..].parse().expect("a number");
                            reader.read_exact(&mut vec![0; length + 2]).expect("a word");
                        }
                        line.clear();
                        if stream.write_all(answer).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn redis(address: String, login: Option<(String, String)>) -> Redis {
        Redis::new(RedisSpec { address, login, database: 0, prefix: String::new(), keep: None })
    }

    #[test]
    fn a_password_is_not_in_what_is_told() {
        // What a Redis says of a command that it does not know.
        let address =
            says(b"-ERR unknown command 'AUTH', with args beginning with: 'somebody' 'a-secret-word' \r\n");
        let login = Some(("somebody".to_owned(), "a-secret-word".to_owned()));
        let error = redis(address, login).has("x", Instant::now() + WAIT).expect_err("it is refused");
        assert_eq!(error.to_string(), "the login is refused (ERR)");
        let error = no_login(WireError::Refused("a-secret-word is wrong".to_owned()));
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn what_is_left_of_an_answer_is_not_the_next_one() {
        // Two answers to each question: the second says that there is an object of that name.
        let mut redis = redis(says(b":0\r\n:1\r\n"), None);
        for name in ["a", "b", "c"] {
            assert!(!redis.has(name, Instant::now() + WAIT).expect("an answer"), "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_line_is_understood_or_refused(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = understand(&line);
            for mark in b"+-:$*" {
                let marked = [&[*mark], line.as_slice(), b"\r\n"].concat();
                if let Err(error) = understand(&marked) {
                    let told = error.to_string();
                    prop_assert!(told.chars().count() < 300 && !told.contains(char::is_control), "{:?}", told);
                }
            }
        }

        #[test]
        fn lengths_are_no_less_than_nothing(number in any::<i64>()) {
            let understood = understand(format!("${number}\r\n").as_bytes());
            let Ok(Answer::Bytes(bytes)) = understood else { panic!("{understood:?}") };
            prop_assert_eq!(bytes, u64::try_from(number).ok());
        }
    }
}
