//! The thread that ends the jobs of closed streams.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::Recorded;
use crate::cuda::{SharedErrorLog, record};
use crate::error::DeviceError;

/// How often the janitor asks while it has something to ask about.
const JANITOR_NAP: Duration = Duration::from_millis(5);

/// A thread that ends the jobs of closed streams; it ends itself when the device object is gone.
pub(super) fn start_janitor(
    ordinal: u32,
    errors: &SharedErrorLog,
) -> Result<mpsc::Sender<Recorded>, DeviceError> {
    let (sender, closed) = mpsc::channel::<Recorded>();
    let errors = Arc::clone(errors);
    let run = move || {
        let mut waiting: Vec<Recorded> = Vec::new();
        loop {
            if waiting.is_empty() {
                match closed.recv() {
                    Ok(first) => waiting.push(first),
                    Err(_) => return,
                }
            }
            waiting.extend(closed.try_iter());
            waiting.retain(|last| match last.is_complete() {
                Ok(is_complete) => !is_complete,
                Err(cause) => {
                    let (what, handle) =
                        ("the jobs of a stream", last.stream.as_ref().map_or(0, |one| one.number));
                    record(&errors, DeviceError::Leaked { what, handle, cause: Box::new(cause) });
                    false
                }
            });
            if !waiting.is_empty() {
                thread::sleep(JANITOR_NAP);
            }
        }
    };
    thread::Builder::new().name(format!("shoal-cuda{ordinal}-end")).spawn(run).map(|_| sender).map_err(
        |error| {
            let source = error.raw_os_error().map_or(Errno::AGAIN, Errno::from_raw_os_error);
            DeviceError::system("starting a device's thread", source)
        },
    )
}
