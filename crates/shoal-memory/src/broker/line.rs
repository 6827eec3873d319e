//! Lines of the control socket: one JSON object each, of bounded length.

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::sync::Weak;
use std::time::{Duration, Instant};

use shoal_core::protocol::{FromServer, FromWorker, LINE_BYTES_MAX};

use super::BrokerClient;
use super::files::FileStream;

pub(super) fn encode(said: &FromWorker) -> Result<Vec<u8>, String> {
    let mut line = serde_json::to_vec(said).map_err(|error| format!("encode: {error}"))?;
    line.push(b'\n');
    if line.len() > LINE_BYTES_MAX {
        return Err(format!("a line of {} bytes is longer than {LINE_BYTES_MAX}", line.len()));
    }
    Ok(line)
}

/// Reads lines until the socket closes or says something that is not the protocol.
pub(super) fn read_all(client: &Weak<BrokerClient>, mut reader: BufReader<FileStream>) {
    let mut line = Vec::new();
    let reason = loop {
        match read(&mut reader, &mut line, None) {
            Ok(said) => {
                let brings_file = matches!(said, FromServer::SlabGrant { .. });
                let file = brings_file.then(|| reader.get_mut().take_file()).flatten();
                match client.upgrade() {
                    Some(client) => client.hear(said, file),
                    None => return,
                }
            }
            Err(reason) => break reason,
        }
    };
    if let Some(client) = client.upgrade() {
        client.close(&reason);
    }
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

fn read(
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
