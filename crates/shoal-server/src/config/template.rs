//! Which models' workers are forked, and which of them from the same process.
//!
//! A process that has imported all takes as much memory as a worker does before it loads, which its children share with it.
//! So there is one for the interpreter of most models, and one for another interpreter or environment only where two models
//! or more have it. Apart because the rule is a promise to users (docs/configuration.md).

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{Engine, ModelConfig, ServerConfig};

/// What makes workers different before they are told what to serve: all else can be set after they were forked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TemplateKind {
    /// The interpreter.
    pub(crate) python: PathBuf,
    /// The environment that the models bring.
    pub(crate) env: BTreeMap<String, String>,
}

impl ServerConfig {
    /// What `model`'s worker is forked from; none where it is started by itself.
    pub(crate) fn template_of(&self, model: &ModelConfig) -> Option<TemplateKind> {
        let kind = |model: &ModelConfig| TemplateKind {
            python: self.python_of(model).to_owned(),
            env: model.env.clone(),
        };
        let can_be = |model: &&ModelConfig| model.engine == Engine::Transformers && model.args.is_empty();
        if !self.fork_workers || !can_be(&model) {
            return None;
        }
        let own = kind(model);
        let is_usual = own.python == self.python && own.env.is_empty();
        let shares = || self.models.iter().filter(can_be).filter(|other| kind(other) == own).count() >= 2;
        (is_usual || shares()).then_some(own)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Surroundings, parse};

    fn config(text: &str) -> ServerConfig {
        let surroundings =
            Surroundings { python: PathBuf::from("/usual"), ..Surroundings::of_this_process() };
        parse(text)
            .and_then(|file| file.resolve(Path::new("/x/shoal.toml"), &surroundings))
            .unwrap_or_else(|problems| panic!("{problems:?}"))
    }

    #[test]
    fn own_environments_are_forked_where_two_models_share_them() {
        let config = config(
            "[server]\ndevice = 'sim'\ndevice_budget = '1GiB'\n\
             [[model]]\nname = 'usual'\nsource = 'x/a'\n\
             [[model]]\nname = 'own'\nsource = 'x/a'\nenv = { A = '1' }\n\
             [[model]]\nname = 'alone'\nsource = 'x/a'\npython = '/other'\n\
             [[model]]\nname = 'one'\nsource = 'x/a'\nenv = { B = '1' }\n\
             [[model]]\nname = 'two'\nsource = 'x/a'\nenv = { B = '1' }\n\
             [[model]]\nname = 'said'\nsource = 'x/a'\nargs = ['--more']\n\
             [[model]]\nname = 'vllm'\nsource = 'x/a'\nengine = 'vllm'\n",
        );
        let of = |name: &str| config.template_of(config.model(name).expect("configured"));
        let usual = of("usual").expect("forked");
        assert_eq!((usual.python.as_path(), usual.env.len()), (Path::new("/usual"), 0));
        assert_eq!(of("one").expect("forked").env, BTreeMap::from([("B".to_owned(), "1".to_owned())]));
        assert_eq!(of("one"), of("two"));
        for by_itself in ["own", "alone", "said", "vllm"] {
            assert_eq!(of(by_itself), None, "{by_itself}");
        }
        let never = ServerConfig { fork_workers: false, ..config.clone() };
        assert_eq!(never.template_of(&config.models[0]), None);
    }

    #[test]
    fn by_default_and_not_where_the_file_says_so() {
        let with = |more: &str| {
            config(&format!(
                "[server]\ndevice = 'sim'\ndevice_budget = '1GiB'\n{more}\n[[model]]\nname = 'a'\nsource = 'x/a'\n"
            ))
        };
        assert!(with("").fork_workers);
        assert!(with("fork_workers = true").fork_workers);
        assert!(!with("fork_workers = false").fork_workers);
        let wrong = parse("[server]\nfork_workers = 'no'\n[[model]]\nname = 'a'\nsource = 'x/a'\n");
        assert!(format!("{:?}", wrong.expect_err("no boolean")).contains("fork_workers"));
    }
}
