//! An object store and a Redis in this process, over real sockets, that err as they are told.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

/// What a fake does with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// What it was asked.
    None,
    /// The connection is closed without a word.
    Close,
    /// No answer, for as long as the other side waits.
    Hang,
    /// The answer comes in small pieces.
    Trickle,
    /// An error that passes.
    Fail,
    /// An error that stays.
    Deny,
    /// One bit of an object is another.
    Flip,
    /// The answer ends early.
    Cut,
    /// Shorter than it was, as if it had been written so.
    Short,
    /// A length that nothing has.
    Long,
    /// Another object's bytes.
    Other,
    /// No protocol at all.
    Noise,
    /// The object is written and nothing is said of it.
    Mute,
}

pub(crate) const FAULTS: [Fault; 12] = [
    Fault::Close,
    Fault::Hang,
    Fault::Trickle,
    Fault::Fail,
    Fault::Deny,
    Fault::Flip,
    Fault::Cut,
    Fault::Short,
    Fault::Long,
    Fault::Other,
    Fault::Noise,
    Fault::Mute,
];

type Choose = Box<dyn FnMut(&str) -> Fault + Send>;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    S3,
    Redis,
}

pub(crate) struct Fake {
    pub(crate) address: String,
    pub(crate) objects: Mutex<HashMap<String, Vec<u8>>>,
    /// Requests by what was done about them.
    pub(crate) given: Mutex<Vec<(String, Fault)>>,
    choose: Mutex<Choose>,
    is_over: AtomicBool,
}

impl Fake {
    /// Serves from now on. `choose` is asked for each request, by its verb.
    pub(crate) fn start(protocol: Protocol, choose: impl FnMut(&str) -> Fault + Send + 'static) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let fake = Arc::new(Self {
            address: listener.local_addr().unwrap().to_string(),
            objects: Mutex::default(),
            given: Mutex::default(),
            choose: Mutex::new(Box::new(choose)),
            is_over: AtomicBool::new(false),
        });
        let serving = Arc::clone(&fake);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.is_over.load(Ordering::Relaxed) {
                    return;
                }
                let serving = Arc::clone(&serving);
                thread::spawn(move || {
                    // An error is the other side's going away.
                    let _ = match protocol {
                        Protocol::S3 => serving.speak_s3(stream),
                        Protocol::Redis => serving.speak_redis(stream),
                    };
                });
            }
        });
        fake
    }

    pub(crate) fn stop(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
    }

    pub(crate) fn count(&self, is_meant: impl Fn(&str, Fault) -> bool) -> usize {
        self.given.lock().iter().filter(|(verb, fault)| is_meant(verb, *fault)).count()
    }

    fn fault(&self, verb: &str) -> Fault {
        let fault = (self.choose.lock())(verb);
        self.given.lock().push((verb.to_owned(), fault));
        fault
    }

    /// The object as this fault gives it.
    fn object(&self, name: &str, fault: Fault) -> Option<Vec<u8>> {
        let objects = self.objects.lock();
        let mut object = objects.get(name)?.clone();
        match fault {
            Fault::Flip => {
                let at = object.len() * 7 / 11;
                object[at] ^= 4;
            }
            Fault::Short => object.truncate(object.len() / 2),
            Fault::Other => {
                let others: Vec<_> = objects.iter().filter(|(other, _)| *other != name).collect();
                object = others.first().map_or_else(|| vec![0; object.len()], |(_, other)| (*other).clone());
            }
            _ => {}
        }
        Some(object)
    }

    fn speak_s3(&self, stream: TcpStream) -> io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut stream = stream;
        loop {
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                let line = line.trim_end().to_owned();
                if line.is_empty() {
                    break;
                }
                lines.push(line);
            }
            let header = |name: &str| {
                lines.iter().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
            };
            let mut words = lines[0].split(' ');
            let (verb, name) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
            let mut body = vec![0; header("content-length:").map_or(0, |text| text.parse().unwrap())];
            reader.read_exact(&mut body)?;
            let authorization = header("authorization:").unwrap_or_default();
            assert!(authorization.starts_with("AWS4-HMAC-SHA256 Credential=someone/"), "{authorization}");
            let fault = self.fault(&verb);
            let answer = match (verb.as_str(), fault) {
                (_, Fault::Close) => return Ok(()),
                (_, Fault::Hang) => return hang(&mut reader),
                (_, Fault::Noise) => b"\x16\x03\x01\x02 this is something else\r\n\r\n".to_vec(),
                (_, Fault::Fail) => error(503, "SlowDown"),
                (_, Fault::Deny) => error(403, "AccessDenied"),
                ("PUT", _) => {
                    self.objects.lock().insert(name, body);
                    if fault == Fault::Mute {
                        return Ok(());
                    }
                    b"HTTP/1.1 200 OK\r\nETag: \"1\"\r\nContent-Length: 0\r\n\r\n".to_vec()
                }
                ("DELETE", _) => {
                    self.objects.lock().remove(&name);
                    b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()
                }
                (_, _) => match self.object(&name, fault) {
                    None => error(404, "NoSuchKey"),
                    Some(object) => {
                        let length = if fault == Fault::Long { 1 << 60 } else { object.len() };
                        let mut answer =
                            format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").into_bytes();
                        if verb == "GET" {
                            answer.extend(object);
                        }
                        answer
                    }
                },
            };
            if !say(&mut stream, answer, fault, verb == "HEAD")? {
                return Ok(());
            }
        }
    }

    fn speak_redis(&self, stream: TcpStream) -> io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut stream = stream;
        loop {
            let Some(count) = number(&mut reader, '*')? else { return Ok(()) };
            let mut words = Vec::new();
            for _ in 0..count {
                let Some(length) = number(&mut reader, '$')? else { return Ok(()) };
                let mut word = vec![0; length + 2];
                reader.read_exact(&mut word)?;
                word.truncate(length);
                words.push(word);
            }
            let text = |at: usize| String::from_utf8_lossy(&words[at]).into_owned();
            let verb = text(0);
            if verb == "AUTH" || verb == "SELECT" {
                stream.write_all(b"+OK\r\n")?;
                continue;
            }
            let fault = self.fault(&verb);
            let answer = match (verb.as_str(), fault) {
                (_, Fault::Close) => return Ok(()),
                (_, Fault::Hang) => return hang(&mut reader),
                (_, Fault::Noise) => b"\r\nHTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
                (_, Fault::Fail) => b"-LOADING Redis is loading the dataset in memory\r\n".to_vec(),
                (_, Fault::Deny) => b"-NOAUTH Authentication required.\r\n".to_vec(),
                ("SET" | "SETEX", _) => {
                    self.objects.lock().insert(text(1), words.last().unwrap().clone());
                    if fault == Fault::Mute {
                        return Ok(());
                    }
                    b"+OK\r\n".to_vec()
                }
                ("DEL", _) => {
                    let had = self.objects.lock().remove(&text(1)).is_some();
                    format!(":{}\r\n", u8::from(had)).into_bytes()
                }
                ("EXISTS", _) => {
                    let has = self.objects.lock().contains_key(&text(1));
                    format!(":{}\r\n", u8::from(has)).into_bytes()
                }
                (_, _) => match self.object(&text(1), fault) {
                    None => b"$-1\r\n".to_vec(),
                    Some(object) => {
                        let length = if fault == Fault::Long { 1 << 60 } else { object.len() };
                        let mut answer = format!("${length}\r\n").into_bytes();
                        answer.extend(object);
                        answer.extend(b"\r\n");
                        answer
                    }
                },
            };
            if !say(&mut stream, answer, fault, false)? {
                return Ok(());
            }
        }
    }
}

/// The number after a mark; none at the end of the stream.
fn number(reader: &mut impl BufRead, mark: char) -> io::Result<Option<usize>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(line.trim_end().strip_prefix(mark).unwrap().parse().unwrap()))
}

fn error(status: u16, code: &str) -> Vec<u8> {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code></Error>");
    format!("HTTP/1.1 {status} No\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Waits until the other side goes away.
fn hang(reader: &mut impl Read) -> io::Result<()> {
    reader.read(&mut [0; 16]).map(|_| ())
}

/// Says an answer; whether the connection goes on.
fn say(stream: &mut TcpStream, mut answer: Vec<u8>, fault: Fault, is_head_only: bool) -> io::Result<bool> {
    if is_head_only {
        // Of what is not sent for HEAD an error's body is the only one.
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        answer.truncate(end);
    }
    match fault {
        Fault::Cut => {
            stream.write_all(&answer[..answer.len() / 2])?;
            return Ok(false);
        }
        Fault::Trickle => {
            for piece in answer.chunks(answer.len() / 5 + 1) {
                stream.write_all(piece)?;
                thread::sleep(Duration::from_millis(2));
            }
        }
        _ => stream.write_all(&answer)?,
    }
    Ok(!matches!(fault, Fault::Noise | Fault::Long))
}
