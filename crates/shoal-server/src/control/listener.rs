//! Where workers connect.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;
use shoal_core::protocol::{FromWorker, VERSION, WorkerHolds};
use tokio::net::{UnixListener, UnixStream};

use super::{ControlError, Incoming, Outgoing};

/// How long a worker may take to say hello, and not to read what it is told.
const PATIENCE: Duration = Duration::from_secs(10);

/// A worker that connected and said who it is; the kernel agrees.
#[derive(Debug)]
pub struct Greeted {
    /// The model it was started for, by its own word.
    pub model: String,
    /// Its process id, by the kernel's word.
    pub pid: u32,
    /// What it holds, where it had another server before.
    pub holds: Option<Box<WorkerHolds>>,
    /// It answers pings.
    pub answers_pings: bool,
    /// What it says.
    pub incoming: Incoming,
    /// What it is told.
    pub outgoing: Outgoing,
}

/// The listening socket. Dropping it removes the file.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listen at `path` (0600). Whoever calls holds the runtime directory, so a socket left there is stale.
    ///
    /// # Errors
    /// [`ControlError::Bind`].
    pub fn bind(path: &Path) -> Result<Self, ControlError> {
        let bind = || {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        let listener = bind().map_err(|source| ControlError::Bind { path: path.to_owned(), source })?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// The next connection, still to be greeted. Greet it on a task of its own: a silent one must not hold up others.
    ///
    /// # Errors
    /// [`ControlError::Io`], such as no file descriptors left.
    pub async fn accept(&self) -> Result<UnixStream, ControlError> {
        Ok(self.listener.accept().await?.0)
    }

    /// Hear who connected.
    ///
    /// # Errors
    /// Silence, another version, somebody else.
    pub async fn greet(stream: UnixStream) -> Result<Greeted, ControlError> {
        let peer = stream.peer_cred()?;
        let (read, write) = stream.into_split();
        let (mut incoming, outgoing) = (Incoming::new(read), Outgoing::new(write, PATIENCE));
        let first = tokio::time::timeout(PATIENCE, incoming.next())
            .await
            .map_err(|_| ControlError::Deadline { what: "a worker's hello", allowed: PATIENCE })??;
        let Some(FromWorker::Hello { version, model, pid, holds, answers_pings }) = first else {
            return Err(ControlError::NoHello);
        };
        if version != VERSION {
            return Err(ControlError::Version { theirs: version, ours: VERSION });
        }
        let ours = rustix::process::geteuid().as_raw();
        if peer.uid() != ours || !peer.pid().is_some_and(|actual| speaks_for(actual, pid)) {
            let actual = format!("process {:?} of user {}", peer.pid(), peer.uid());
            return Err(ControlError::Impostor { claimed: pid, actual });
        }
        Ok(Greeted { model, pid, holds, answers_pings, incoming, outgoing })
    }
}

/// Whether a process may say that it is process `claimed`: it is, or that one leads its group. A worker is started as the
/// leader of a group of its own, so whoever is in it was started by it: an engine that keeps its memory in a child.
fn speaks_for(actual: i32, claimed: u32) -> bool {
    let Some((actual, claimed)) =
        Pid::from_raw(actual).zip(i32::try_from(claimed).ok().and_then(Pid::from_raw))
    else {
        return false;
    };
    actual == claimed || rustix::process::getpgid(Some(actual)) == Ok(claimed)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the control socket was gone already");
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::bytes::ByteCount;
    use shoal_core::protocol::{FromServer, LINE_BYTES_MAX};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    use super::*;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    async fn said(
        lines: &[u8],
    ) -> Result<(Result<Greeted, ControlError>, UnixStream), Box<dyn std::error::Error>> {
        let scratch = tempfile::tempdir()?;
        let listener = Listener::bind(&scratch.path().join("control.sock"))?;
        let mut client = UnixStream::connect(scratch.path().join("control.sock")).await?;
        client.write_all(lines).await?;
        Ok((Listener::greet(listener.accept().await?).await, client))
    }

    fn hello(version: u32, pid: u32) -> Vec<u8> {
        format!("{{\"say\":\"hello\",\"version\":{version},\"model\":\"ash\",\"pid\":{pid}}}\n").into_bytes()
    }

    #[tokio::test]
    async fn a_worker_is_greeted_and_both_sides_speak() -> Outcome {
        let mut lines = hello(VERSION, std::process::id());
        lines.extend_from_slice(
            b"{\"say\":\"lease_return\",\"kind\":\"kv\",\"bytes\":4096}\n{\"say\":\"lease",
        );
        let (greeted, mut client) = said(&lines).await?;
        let mut greeted = greeted?;
        assert_eq!((greeted.model.as_str(), greeted.pid), ("ash", std::process::id()));
        let message = greeted.incoming.next().await?.ok_or("closed")?;
        assert!(matches!(message, FromWorker::LeaseReturn { bytes: ByteCount(4096), .. }), "{message:?}");
        greeted.outgoing.say(&FromServer::LeaseDeny { request: 1, reason: "full".to_owned() }).await?;
        let mut line = String::new();
        BufReader::new(&mut client).read_line(&mut line).await?;
        assert_eq!(line, "{\"say\":\"lease_deny\",\"request\":1,\"reason\":\"full\"}\n");
        drop(client);
        assert!(greeted.incoming.next().await?.is_none(), "half a line is no message");
        Ok(())
    }

    #[tokio::test]
    async fn a_child_speaks_for_the_leader_of_its_group_and_for_nobody_else() -> Outcome {
        use std::os::unix::process::CommandExt;
        let mut leader = std::process::Command::new("sh");
        leader
            .args(["-c", "sleep 100 & echo $!; wait"])
            .process_group(0)
            .stdout(std::process::Stdio::piped());
        let mut leader = leader.spawn()?;
        let mut line = String::new();
        let mut out = std::io::BufReader::new(leader.stdout.take().ok_or("a pipe")?);
        std::io::BufRead::read_line(&mut out, &mut line)?;
        let child: i32 = line.trim().parse()?;
        let claims = [leader.id(), u32::try_from(child)?, std::process::id(), 0, u32::MAX];
        assert_eq!(claims.map(|claimed| speaks_for(child, claimed)), [true, true, false, false, false]);
        assert!(!speaks_for(i32::try_from(leader.id())?, u32::try_from(child)?));
        let group = i32::try_from(leader.id()).ok().and_then(Pid::from_raw).ok_or("a group")?;
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL)?;
        leader.wait()?;
        Ok(())
    }

    #[tokio::test]
    async fn strangers_are_turned_away() -> Outcome {
        assert!(matches!(said(&hello(VERSION, 1)).await?.0, Err(ControlError::Impostor { .. })));
        assert!(matches!(said(&hello(VERSION + 1, 1)).await?.0, Err(ControlError::Version { .. })));
        assert!(matches!(said(b"{\"say\":\"hello\"}\n").await?.0, Err(ControlError::Malformed { .. })));
        assert!(matches!(said(b"GET / HTTP/1.1\r\n").await?.0, Err(ControlError::Malformed { .. })));
        let usage = b"{\"say\":\"lease_cancel\",\"request\":1}\n";
        assert!(matches!(said(usage).await?.0, Err(ControlError::NoHello)));
        Ok(())
    }

    #[tokio::test]
    async fn a_line_without_end_is_cut_off() -> Outcome {
        let scratch = tempfile::tempdir()?;
        let listener = Listener::bind(&scratch.path().join("control.sock"))?;
        let mut client = UnixStream::connect(scratch.path().join("control.sock")).await?;
        let flood = tokio::spawn(async move { client.write_all(&vec![b'x'; LINE_BYTES_MAX + 100]).await });
        let greeted = Listener::greet(listener.accept().await?).await;
        assert!(matches!(greeted, Err(ControlError::TooLong { .. })), "{greeted:?}");
        flood.abort();
        Ok(())
    }
}
