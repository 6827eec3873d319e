//! The server's own log: words for people, or one JSON object a line for programs.
//!
//! An event carries its model, name and number as fields, for the JSON form. In words they would be said twice (the
//! sentence begins with the model), so the form for people leaves them out, and keeps the fields of everything else.

use std::fmt;
use std::io::IsTerminal;

use tracing::field::{Field, Visit};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;

use super::Failure;

/// Logs to standard error: what `SHOAL_LOG` lets through, as `SHOAL_LOG_FORMAT` says.
pub(super) fn set_up() -> Result<(), Failure> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("SHOAL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,shoal_server=info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Whoever embeds us may have set up a log of their own; theirs stays.
    match std::env::var("SHOAL_LOG_FORMAT").as_deref() {
        Ok("json") => {
            let _ = log.json().flatten_event(true).try_init();
        }
        Err(_) | Ok("" | "text") => {
            let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            let _ = log.with_ansi(colours).with_target(false).fmt_fields(Words).try_init();
        }
        Ok(other) => {
            let message = format!("SHOAL_LOG_FORMAT is {other:?}; it may be text or json");
            return Err(Failure { code: 2, message });
        }
    }
    Ok(())
}

/// The fields of a line, for people.
#[derive(Clone, Copy, Debug)]
struct Words;

impl<'writer> FormatFields<'writer> for Words {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut said = Said::default();
        fields.record(&mut said);
        writer.write_str(&said.message)?;
        for (name, value) in &said.others {
            if said.is_event && matches!(*name, "model" | "event" | "id") {
                continue;
            }
            write!(writer, " {name}={value}")?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Said {
    message: String,
    others: Vec<(&'static str, String)>,
    is_event: bool,
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => {
                self.is_event |= name == "event";
                self.others.push((name, format!("{value:?}")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn people_read_an_event_once_and_all_fields_of_the_rest() {
        let kept = Kept::default();
        let writer = kept.clone();
        let log = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_target(false)
            .without_time()
            .fmt_fields(Words)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(log, || {
            tracing::info!(model = "chat", event = "pinned", id = 7, "chat: pinned");
            tracing::warn!(model = "chat", why = %"it is gone", "asking again");
        });
        let text = String::from_utf8(kept.0.lock().clone()).expect("text");
        assert_eq!(text, " INFO chat: pinned\n WARN asking again model=\"chat\" why=it is gone\n");
    }
}
