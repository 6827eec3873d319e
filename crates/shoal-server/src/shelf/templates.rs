//! What workers are forked from: which process for which models, from when until when.
//!
//! Apart because no model depends on it. Whatever goes wrong here, a worker is started by itself, and what went wrong is told
//! in the log. A template is started for the first worker that can be forked from it, which waits for it: it would import the
//! same by itself meanwhile, so it loses nothing, and the cores of a small machine are not asked for the same twice. One that
//! ended is replaced at a later start, after growing pauses where it did not live long; one that imports what must not be in
//! a template is not until a reload.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio_util::task::TaskTracker;

use super::Shared;
use super::tasks::KILLED_WAIT_MAX;
use crate::config::{ModelConfig, ServerConfig, TemplateKind};
use crate::supervisor::{Backoff, Forked, Launch, Template, TemplateLaunch, Waits};

/// Where templates' own output goes; no model's log is called so.
pub(super) const LOG: &str = "template.out";
/// The least and the longest pause before the next template of a kind, and the life that makes up for those before.
const PAUSE_FIRST: Duration = Duration::from_secs(10);
const PAUSE_MAX: Duration = Duration::from_mins(10);
const FORGIVEN_AFTER: Duration = Duration::from_mins(1);

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Templates {
    kinds: Mutex<BTreeMap<TemplateKind, Slot>>,
    tasks: TaskTracker,
}

/// One kind's.
#[derive(Debug)]
struct Slot {
    template: Option<Arc<Template>>,
    backoff: Backoff,
    not_before: Instant,
    /// Why there is none until a reload: the next would only import to find the same.
    never: Option<String>,
}

impl Slot {
    fn new() -> Self {
        let backoff = Backoff::new(PAUSE_FIRST, PAUSE_MAX, FORGIVEN_AFTER);
        Self { template: None, backoff, not_before: Instant::now(), never: None }
    }

    /// The one that lives. One that ended is taken out, and its pause begins where its life ended.
    fn living(&mut self) -> Option<Arc<Template>> {
        let template = self.template.as_ref()?;
        if let Some((lived, at)) = template.ended() {
            self.never = template.why_never();
            self.template = None;
            self.not_before = at + self.backoff.ended(lived);
            return None;
        }
        Some(Arc::clone(template))
    }

    /// # Errors
    /// Why no other may be started at `now`.
    fn may_start(&self, now: Instant) -> Result<(), String> {
        if let Some(reason) = &self.never {
            return Err(format!("until a reload: {reason}"));
        }
        let left = self.not_before.saturating_duration_since(now);
        if left.is_zero() {
            return Ok(());
        }
        Err(format!("the template before ended; the next is started in {} s", left.as_secs() + 1))
    }
}

impl Templates {
    /// Forks a worker. None where it is to be started by itself.
    pub(super) async fn fork(
        &self,
        shared: &Shared,
        config: &ServerConfig,
        model: &ModelConfig,
        launch: &Launch,
    ) -> Option<Forked> {
        let kind = config.template_of(model)?;
        let forked = match self.find(shared, kind, launch) {
            Ok(template) => template.fork(launch).await,
            Err(reason) => Err(reason),
        };
        match forked {
            Ok(forked) => Some(forked),
            Err(reason) => {
                tracing::info!(model = launch.model, reason, "a worker is started by itself and not forked");
                None
            }
        }
    }

    fn find(&self, shared: &Shared, kind: TemplateKind, launch: &Launch) -> Result<Arc<Template>, String> {
        let mut kinds = self.kinds.lock();
        // A reload puts its configuration in place first and looks for what that does not need then, so one of before it is
        // either seen here or ended there.
        let config = shared.with(|core, _| Arc::clone(&core.config));
        if !config.models.iter().any(|model| config.template_of(model).as_ref() == Some(&kind)) {
            return Err("the configuration has come to be another one".to_owned());
        }
        let begin = of_kind(&kind, &config.log_dir.join(LOG), launch);
        let slot = kinds.entry(kind).or_insert_with(Slot::new);
        if let Some(template) = slot.living() {
            return Ok(template);
        }
        slot.may_start(Instant::now())?;
        match Template::start(&begin, shared.cancel.clone(), &self.tasks) {
            Ok(template) => {
                let template = Arc::new(template);
                tracing::info!(pid = template.pid(), python = %begin.python.display(), "a template starts");
                slot.template = Some(Arc::clone(&template));
                Ok(template)
            }
            Err(reason) => {
                slot.not_before = Instant::now() + slot.backoff.ended(Duration::ZERO);
                Err(reason)
            }
        }
    }

    /// At a reload: ends those that no model of this configuration is forked from. The others may be tried again, whatever
    /// was wrong.
    pub(super) fn keep_needed(&self, config: &ServerConfig) {
        let needed: Vec<_> = config.models.iter().filter_map(|model| config.template_of(model)).collect();
        let mut kinds = self.kinds.lock();
        kinds.retain(|kind, _| needed.contains(kind));
        for slot in kinds.values_mut() {
            // The reason of one that has ended unseen until now goes with it.
            let _living = slot.living();
            slot.never = None;
        }
    }

    /// Once the server has ended all: waits a bounded time until no template is left.
    pub(super) async fn close(&self) {
        self.kinds.lock().clear();
        self.tasks.close();
        if tokio::time::timeout(KILLED_WAIT_MAX, self.tasks.wait()).await.is_err() {
            tracing::warn!("a template is still there");
        }
    }
}

/// How one of this kind is started; `launch` is that of any worker of it.
fn of_kind(kind: &TemplateKind, log: &Path, launch: &Launch) -> TemplateLaunch {
    let mut env = launch.env.clone();
    // These belong to one worker and are set in it.
    for own in ["SHOAL_CONTROL", "SHOAL_MODEL"] {
        env.remove(own);
    }
    TemplateLaunch { python: kind.python.clone(), env, log: log.to_owned(), waits: Waits::default() }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::{Surroundings, parse};
    use crate::shelf::Shelf;
    use crate::supervisor::WORKER_REMEDY;

    /// One model, of an interpreter that there is not.
    fn config(directory: &Path, more: &str) -> ServerConfig {
        let surroundings = Surroundings {
            python: "/none/python".into(),
            runtime_dir: directory.join("run"),
            state_home: directory.join("state"),
            cache_home: directory.join("cache"),
            budgets_before: None,
            ..Surroundings::of_this_process()
        };
        let text = format!(
            "[server]\nlisten = '127.0.0.1:0'\ndevice = 'sim'\ndevice_budget = '1GiB'\n{more}\n\
             [[model]]\nname = 'ash'\nsource = '/none'\n"
        );
        parse(&text)
            .and_then(|file| file.resolve(&directory.join("shoal.toml"), &surroundings))
            .unwrap_or_else(|problems| panic!("{problems:?}"))
    }

    /// A template that does as the script says, once it has ended.
    async fn ended(directory: &Path, script: &str) -> Slot {
        let begin = TemplateLaunch {
            python: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_python.sh").into(),
            env: [("SCRIPT".to_owned(), script.to_owned())].into(),
            log: directory.join(LOG),
            waits: Waits::default(),
        };
        let tasks = TaskTracker::new();
        let template = Template::start(&begin, CancellationToken::new(), &tasks).expect("a process");
        tasks.close();
        tasks.wait().await;
        Slot { template: Some(Arc::new(template)), ..Slot::new() }
    }

    #[tokio::test]
    async fn what_will_be_so_again_is_not_tried_again_and_what_may_have_changed_is() {
        let scratch = tempfile::tempdir().expect("a directory");
        let lasting = r#"echo '{"say":"failed","reason":"it has 2 threads","lasting":true}' >&0; exit 1"#;
        let later = Instant::now() + PAUSE_MAX * 2;
        let mut slot = ended(scratch.path(), lasting).await;
        assert!(slot.living().is_none());
        let why = slot.may_start(later).expect_err("it would have two again");
        assert!(why.starts_with("until a reload: ") && why.ends_with("it has 2 threads"), "{why}");
        // Others that ended may be followed by another after a pause.
        let passing = r#"echo '{"say":"failed","reason":"no torch","lasting":false}' >&0; exit 1"#;
        let mut slot = ended(scratch.path(), passing).await;
        assert!(slot.living().is_none());
        assert!(slot.may_start(Instant::now()).expect_err("a pause").contains("is started in"));
        assert_eq!(slot.may_start(later), Ok(()));
    }

    #[tokio::test]
    async fn a_reload_forgets_what_was_to_be_so_again() {
        let scratch = tempfile::tempdir().expect("a directory");
        let lasting = r#"echo '{"say":"failed","reason":"it has 2 threads","lasting":true}' >&0; exit 1"#;
        let config = config(scratch.path(), "");
        let kind = config.template_of(&config.models[0]).expect("it is forked");
        let templates = Templates::default();
        let slot = ended(scratch.path(), lasting).await;
        templates.kinds.lock().insert(kind.clone(), slot);
        templates.keep_needed(&config);
        let slot = templates.kinds.lock().remove(&kind).expect("it is needed");
        assert_eq!(slot.may_start(Instant::now() + PAUSE_MAX * 2), Ok(()));
    }

    #[tokio::test]
    async fn a_start_of_the_configuration_before_makes_no_template_after_a_reload() {
        let scratch = tempfile::tempdir().expect("a directory");
        let before = config(scratch.path(), "");
        let after = config(scratch.path(), "fork_workers = false");
        let shelf = Shelf::start(Arc::new(after)).expect("the shelf starts");
        let launch = Launch {
            model: "ash".to_owned(),
            command: vec![],
            env: BTreeMap::new(),
            log: scratch.path().join("ash.log"),
            remedy: WORKER_REMEDY,
        };
        let shared = shelf.shared();
        let templates = &shared.templates;
        let forked = templates.fork(shared, &before, &before.models[0], &launch).await;
        assert!(forked.is_none() && templates.kinds.lock().is_empty(), "nobody would ever end it");
        shelf.shutdown(Instant::now()).await;
    }
}
