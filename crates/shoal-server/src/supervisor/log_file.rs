//! Where a worker's output goes, bounded.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::bounded::bounded;

/// A log longer than this is put aside (as `NAME.log.1`, replacing the one before), also while its worker writes.
pub const LOG_BYTES_MAX: u64 = 16 << 20;

/// How far back the last line of a log is looked for.
const LAST_BYTES_MAX: u64 = 8 << 10;
/// How much of it is shown.
const LAST_LINE_CHARS_MAX: usize = 240;

/// Open a log to append to (0600), putting a long one aside first.
///
/// # Errors
/// The directory cannot be written.
pub fn open_log(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path).is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".1");
        std::fs::rename(path, aside)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Put a long log that somebody appends to aside: copied, then cut to nothing, because its writer keeps it open. Lines
/// that are written between the two are lost. True where it was long.
///
/// # Errors
/// The directory cannot be written, or is full. The log is cut then too: it must not grow without an end.
pub fn bound_log(path: &Path, bytes_max: u64) -> io::Result<bool> {
    let log = match OpenOptions::new().write(true).open(path) {
        Ok(log) => log,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if log.metadata()?.len() <= bytes_max {
        return Ok(false);
    }
    let mut aside = path.as_os_str().to_owned();
    aside.push(".1");
    let copied = std::fs::copy(path, aside);
    log.set_len(0)?;
    copied.map(|_| true)
}

/// The last lines of a log, `bytes_max` at most, from the first whole line on. Empty where there is no log.
#[must_use]
pub fn tail(path: &Path, bytes_max: u64) -> String {
    let read = || -> io::Result<String> {
        let mut log = File::open(path)?;
        let from = log.metadata()?.len().saturating_sub(bytes_max);
        log.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        log.take(bytes_max).read_to_end(&mut bytes)?;
        let start = if from == 0 { 0 } else { bytes.iter().position(|b| *b == b'\n').map_or(0, |at| at + 1) };
        Ok(String::from_utf8_lossy(&bytes[start..]).into_owned())
    };
    read().unwrap_or_default()
}

/// The last line of a log that is not blank, among what was written from `from` on: without control characters, and
/// its beginning where it is long.
#[must_use]
pub fn last_line(path: &Path, from: u64) -> Option<String> {
    let mut log = File::open(path).ok()?;
    let length = log.metadata().ok()?.len();
    let near = length.saturating_sub(LAST_BYTES_MAX);
    // Put aside since: all that is there now is newer.
    let from = if from > length { 0 } else { from };
    log.seek(SeekFrom::Start(from.max(near))).ok()?;
    let mut bytes = Vec::new();
    log.take(LAST_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let is_blank = |line: &str| line.chars().all(|c| c.is_whitespace() || c.is_control());
    let line = text.lines().rev().find(|line| !is_blank(line))?;
    Some(bounded(line, LAST_LINE_CHARS_MAX))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_long_log_is_put_aside_under_its_writer() -> io::Result<()> {
        let scratch = tempfile::tempdir()?;
        let path = scratch.path().join("ash.log");
        assert!(!bound_log(&path, 8)?, "there is none");
        let mut writer = open_log(&path)?;
        writer.write_all(b"12345678")?;
        assert!(!bound_log(&path, 8)?);
        writer.write_all(b"9\n")?;
        assert!(bound_log(&path, 8)?);
        writer.write_all(b"new\n")?;
        assert_eq!(std::fs::read(&path)?, b"new\n", "the writer goes on at the beginning");
        assert_eq!(std::fs::read(scratch.path().join("ash.log.1"))?, b"123456789\n");
        assert_eq!(last_line(&path, 9).as_deref(), Some("new"));
        Ok(())
    }

    #[test]
    fn appends_turns_and_tails() -> io::Result<()> {
        let scratch = tempfile::tempdir()?;
        let path = scratch.path().join("ash.log");
        open_log(&path)?.write_all(b"one\n")?;
        open_log(&path)?.write_all(b"two\nthree\n")?;
        assert_eq!(tail(&path, 1000), "one\ntwo\nthree\n");
        assert_eq!(tail(&path, 8), "three\n");
        assert_eq!(last_line(&path, 0).as_deref(), Some("three"));
        assert_eq!(last_line(&path, 14), None);
        open_log(&path)?.write_all(format!("\x1b[31m{}\n\n", "x".repeat(500)).as_bytes())?;
        let long = last_line(&path, 14).unwrap_or_default();
        assert!(long.starts_with("[31mxxx") && long.ends_with("x...") && long.len() == 243, "{long}");
        File::options().write(true).open(&path)?.set_len(LOG_BYTES_MAX + 1)?;
        open_log(&path)?.write_all(b"fresh\n")?;
        assert_eq!(tail(&path, 1000), "fresh\n");
        assert!(scratch.path().join("ash.log.1").exists());
        assert_eq!(tail(&scratch.path().join("none.log"), 10), "");
        Ok(())
    }
}
