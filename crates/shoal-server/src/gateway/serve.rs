//! Listening, and stopping to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::App;

/// Takes the address, before anything else is started.
///
/// # Errors
/// A sentence that says what is wrong with the address.
pub async fn bind(listen: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(listen).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => format!(
            "{listen} is in use by another program; stop it, or set another `listen` under [server] \
             (port 0 takes any free one)"
        ),
        std::io::ErrorKind::PermissionDenied => {
            format!(
                "no permission to listen on {listen}; ports below 1024 need a privilege, take a higher one"
            )
        }
        std::io::ErrorKind::AddrNotAvailable => format!("{listen} is not an address of this machine"),
        _ => format!("cannot listen on {listen}: {error}"),
    })
}

/// Answers requests until `stop` is cancelled, then lets those under way finish for at most `linger_max`.
///
/// # Errors
/// The listener's.
pub async fn serve(
    listener: TcpListener,
    app: &Arc<App>,
    stop: CancellationToken,
    linger_max: Duration,
) -> std::io::Result<()> {
    let listener = listener.tap_io(|connection| {
        // Tokens are small and must not wait for one another.
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "a connection keeps its delay");
        }
    });
    let served = axum::serve(listener, app.router()).with_graceful_shutdown(stop.clone().cancelled_owned());
    let lingered = async {
        stop.cancelled().await;
        app.begin_ending();
        tokio::time::sleep(linger_max).await;
    };
    tokio::select! {
        result = served => result,
        () = lingered => Ok(()),
    }
}
