//! Which workers this server started, written down so that a server after it finds them.
//!
//! One line a fact in a file of the runtime directory: a checksum and a JSON object. A line is written before its worker
//! may outlive the server (it learns that it may in its welcome), and a line that was torn by a server's death ends what is
//! read. The file is written anew when it has grown, and at every start; it goes when no worker is left.
//!
//! Nothing is forced to a disk: what a process wrote outlives that process in the kernel's memory, and what would lose
//! that, the machine's end, ends the workers too. The machine's present life is in the first line for that reason.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::identity;
use crate::config::Budgets;

const VERSION: u32 = 1;
/// A journal longer than this is written anew.
const BYTES_MAX: u64 = 64 << 10;
/// The most that is read of one: more than any server writes.
const READ_BYTES_MAX: u64 = 4 << 20;

/// A worker that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The model it was started for.
    pub model: String,
    /// Its process.
    pub pid: u32,
    /// When that began, in ticks: numbers are used again.
    pub start: u64,
    /// Where it answers.
    pub socket: PathBuf,
    /// What it was started with; see `config::fingerprint`.
    pub fingerprint: String,
    /// Where it writes.
    pub log: PathBuf,
    /// Where its own output begins there.
    pub log_from: u64,
    /// How many were started for the model, this one included.
    pub starts: u32,
    /// When it was started (milliseconds since the Unix epoch).
    pub at_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
enum Line {
    Server { version: u32, boot: String, budgets: Budgets },
    Started(Entry),
    Ended { pid: u32 },
}

/// What a server before left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Workers that it did not see end, in the order of their starts. Whether they live is for others to see.
    pub workers: Vec<Entry>,
    /// What it shared among them.
    pub budgets: Option<Budgets>,
}

impl Left {
    /// What is shared among workers that live; none where none does.
    #[must_use]
    pub fn budgets_in_use(&self) -> Option<Budgets> {
        let is_alive = |entry: &Entry| identity::started(entry.pid) == Some(entry.start);
        self.budgets.filter(|_| self.workers.iter().any(is_alive))
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    budgets: Budgets,
    workers: Vec<Entry>,
    file: Option<File>,
    written: u64,
}

impl Journal {
    /// What was left at `path`; nothing where there is no journal, or one of another life of the machine.
    #[must_use]
    pub fn read(path: &Path) -> Left {
        use std::io::Read;
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(READ_BYTES_MAX).read_to_end(&mut bytes));
        if let Err(error) = read {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%error, path = %path.display(), "the journal of the server before cannot be read");
            }
            return Left::default();
        }
        Self::parse(&bytes, &identity::boot())
    }

    /// [`read`](Self::read) of these bytes: up to the first line that is not whole.
    pub(crate) fn parse(bytes: &[u8], boot: &str) -> Left {
        let mut left = Left::default();
        let lines = bytes.split_inclusive(|byte| *byte == b'\n').filter_map(|line| line.strip_suffix(b"\n"));
        for line in lines {
            match decode(line) {
                Some(Line::Server { version: VERSION, boot: theirs, budgets }) if theirs == boot => {
                    left.budgets = Some(budgets);
                }
                Some(Line::Started(entry)) if left.budgets.is_some() => {
                    left.workers.retain(|known| known.pid != entry.pid);
                    left.workers.push(entry);
                }
                Some(Line::Ended { pid }) if left.budgets.is_some() => {
                    left.workers.retain(|known| known.pid != pid);
                }
                // Torn, of another version, or of another life of the machine.
                _ => break,
            }
        }
        left
    }

    /// Begins a journal at `path` with workers that are there already. Where it cannot be written, nothing is: workers then
    /// end with their server.
    #[must_use]
    pub fn begin(path: PathBuf, budgets: Budgets, workers: Vec<Entry>) -> Self {
        let mut journal = Self { path, budgets, workers, file: None, written: 0 };
        journal.rewrite();
        journal
    }

    /// Whether what is written down is there to be found.
    #[must_use]
    pub const fn is_kept(&self) -> bool {
        self.file.is_some()
    }

    /// A worker was started.
    pub fn started(&mut self, entry: Entry) {
        self.workers.retain(|known| known.pid != entry.pid);
        self.workers.push(entry.clone());
        self.append(&Line::Started(entry));
    }

    /// A worker's process is gone.
    pub fn ended(&mut self, pid: u32) {
        let before = self.workers.len();
        self.workers.retain(|known| known.pid != pid);
        if self.workers.len() != before {
            self.append(&Line::Ended { pid });
        }
    }

    /// The server ends in order: where no worker is left, there is nothing to find.
    pub fn close(&mut self) {
        if self.workers.is_empty() {
            self.file = None;
            let _ = std::fs::remove_file(&self.path);
        }
    }

    fn append(&mut self, line: &Line) {
        if self.written > BYTES_MAX || self.file.is_none() {
            return self.rewrite();
        }
        let Some(file) = &mut self.file else { return };
        match encode(line).and_then(|line| file.write_all(&line).map(|()| line.len())) {
            Ok(bytes) => self.written += bytes as u64,
            // Half a line may stand there, which would hide those after it.
            Err(error) => {
                tracing::warn!(%error, "the journal cannot be written and is begun anew");
                self.rewrite();
            }
        }
    }

    /// Writes what there is to a new file, which takes the old one's place whole.
    fn rewrite(&mut self) {
        let write = || -> io::Result<(File, u64)> {
            let path = self.path.with_extension("new");
            let mut open = OpenOptions::new();
            let mut file = open.create(true).write(true).truncate(true).mode(0o600).open(&path)?;
            let server = Line::Server { version: VERSION, boot: identity::boot(), budgets: self.budgets };
            let mut text = encode(&server)?;
            for entry in &self.workers {
                text.extend(encode(&Line::Started(entry.clone()))?);
            }
            file.write_all(&text)?;
            std::fs::rename(&path, &self.path)?;
            Ok((file, text.len() as u64))
        };
        match write() {
            Ok((file, written)) => (self.file, self.written) = (Some(file), written),
            Err(error) => {
                tracing::warn!(
                    %error,
                    path = %self.path.display(),
                    "the journal cannot be written: workers end with this server, should it be killed"
                );
                self.file = None;
            }
        }
    }
}

fn encode(line: &Line) -> io::Result<Vec<u8>> {
    let json = serde_json::to_string(line)?;
    Ok(format!("{:016x} {json}\n", xxh3_64(json.as_bytes())).into_bytes())
}

fn decode(line: &[u8]) -> Option<Line> {
    let (sum, json) = line.split_at_checked(17)?;
    let sum = std::str::from_utf8(sum.strip_suffix(b" ")?).ok()?;
    if u64::from_str_radix(sum, 16).ok()? != xxh3_64(json) {
        return None;
    }
    serde_json::from_slice(json).ok()
}

#[cfg(test)]
mod tests {
    use shoal_core::bytes::ByteCount;

    use super::*;

    const BUDGETS: Budgets = Budgets { device: ByteCount::mib(64), host: ByteCount::mib(128) };

    fn entry(pid: u32) -> Entry {
        Entry {
            model: format!("m{pid}"),
            pid,
            start: 7,
            socket: PathBuf::from("/run/worker-0.sock"),
            fingerprint: "0123".to_owned(),
            log: PathBuf::from("/logs/m.log"),
            log_from: 3,
            starts: 1,
            at_ms: 5,
        }
    }

    #[test]
    fn what_was_started_and_did_not_end_is_found() {
        let scratch = tempfile::tempdir().expect("a directory");
        let path = scratch.path().join("journal");
        assert_eq!(Journal::read(&path), Left::default());
        let mut journal = Journal::begin(path.clone(), BUDGETS, vec![entry(1)]);
        assert!(journal.is_kept());
        for pid in 2..5 {
            journal.started(entry(pid));
        }
        journal.ended(3);
        journal.ended(9);
        let left = Journal::read(&path);
        assert_eq!(left.budgets, Some(BUDGETS));
        assert_eq!(left.workers, [entry(1), entry(2), entry(4)]);
        journal.close();
        assert!(path.exists(), "workers are left");
        for pid in [1, 2, 4] {
            journal.ended(pid);
        }
        journal.close();
        assert!(std::fs::read_dir(scratch.path()).expect("there").next().is_none(), "no file is left");
    }

    /// Whatever moment a server dies at: every prefix of a journal reads as the facts whose lines are whole.
    #[test]
    fn a_torn_or_changed_line_ends_what_is_read() {
        let boot = "this life";
        let server = Line::Server { version: VERSION, boot: boot.to_owned(), budgets: BUDGETS };
        let lines = [server, Line::Started(entry(1)), Line::Started(entry(2)), Line::Ended { pid: 1 }];
        let lines: Vec<Vec<u8>> = lines.iter().map(|line| encode(line).expect("plain data")).collect();
        let whole = lines.concat();
        let expected = [vec![], vec![], vec![1], vec![1, 2], vec![2]];
        for cut in 0..=whole.len() {
            let left = Journal::parse(&whole[..cut], boot);
            let mut end = 0;
            let count = lines.iter().take_while(|line| {
                end += line.len();
                end <= cut
            });
            let pids: Vec<u32> = left.workers.iter().map(|entry| entry.pid).collect();
            assert_eq!(pids, expected[count.count()], "cut at {cut}");
        }
        for index in 0..whole.len() {
            let mut wrong = whole.clone();
            wrong[index] ^= 1;
            for worker in Journal::parse(&wrong, boot).workers {
                assert!(worker == entry(1) || worker == entry(2), "{worker:?}");
            }
        }
        assert_eq!(Journal::parse(&whole, "another life"), Left::default());
    }

    #[test]
    fn it_stays_short_and_one_that_cannot_be_written_says_so() {
        let scratch = tempfile::tempdir().expect("a directory");
        let path = scratch.path().join("journal");
        let mut journal = Journal::begin(path.clone(), BUDGETS, vec![]);
        for pid in 1..2_000 {
            journal.started(entry(pid));
            journal.ended(pid - 1);
        }
        let length = std::fs::metadata(&path).expect("there").len();
        assert!(length < BYTES_MAX + 1_000, "{length}");
        assert_eq!(Journal::read(&path).workers, [entry(1_999)]);
        let nowhere = Journal::begin(scratch.path().join("none/journal"), BUDGETS, vec![]);
        assert!(!nowhere.is_kept());
    }
}
