//! Lines of the control socket: one JSON object each, of bounded length.

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::time::{Duration, Instant};

use shoal_core::protocol::{FromServer, FromWorker, LINE_BYTES_MAX};

use super::files::FileStream;

pub(super) fn encode(said: &FromWorker) -> Result<Vec<u8>, String> {
    let mut line = serde_json::to_vec(said).map_err(|error| format!("encode: {error}"))?;
    line.push(b'\n');
    if line.len() > LINE_BYTES_MAX {
        return Err(format!("a line of {} bytes is longer than {LINE_BYTES_MAX}", line.len()));
    }
    Ok(line)
}

/// Reads one line before `deadline`.
pub(super) fn read_before(
    reader: &mut BufReader<FileStream>,
    deadline: Instant,
) -> Result<FromServer, String> {
    let said = read(reader, &mut Vec::new(), Some(deadline));
    reader
        .get_ref()
        .socket()
        .set_read_timeout(None)
        .map_err(|error| format!("clear the deadline: {error}"))?;
    said
}

pub(super) fn read(
    reader: &mut BufReader<FileStream>,
    line: &mut Vec<u8>,
    deadline: Option<Instant>,
) -> Result<FromServer, String> {
    line.clear();
    while line.last() != Some(&b'\n') {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("no answer in time".to_owned());
            }
            let timeout = Some(left.max(Duration::from_millis(1)));
            let set = reader.get_ref().socket().set_read_timeout(timeout);
            set.map_err(|error| format!("set a deadline: {error}"))?;
        }
        let room = LINE_BYTES_MAX + 1 - line.len();
        match reader.by_ref().take(room as u64).read_until(b'\n', line) {
            Ok(0) => return Err("the server closed it".to_owned()),
            Ok(_) if line.len() > LINE_BYTES_MAX => {
                return Err(format!("the server sent a line longer than {LINE_BYTES_MAX} bytes"));
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(format!("read: {error}")),
        }
    }
    serde_json::from_slice(line)
        .map_err(|error| format!("the server sent a line that is not the protocol: {error}"))
}
