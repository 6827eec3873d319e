//! Who asks, as far as sharing a model goes: the API key that was shown, by its name. Never the key itself.

use std::fmt;
use std::sync::Arc;

/// Who a request is from. Requests that show no key, where none is wanted, are all of one caller.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Caller {
    name: Option<Arc<str>>,
    has_rivals: bool,
}

impl Caller {
    /// The one with a key of that name. `has_rivals`: there are keys of other names, so it is to leave room for them.
    #[must_use]
    pub fn new(name: &str, has_rivals: bool) -> Self {
        Self { name: Some(name.into()), has_rivals }
    }

    /// The key's name; none where no key is wanted.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// There are others whom it may keep waiting.
    #[must_use]
    pub const fn has_rivals(&self) -> bool {
        self.has_rivals
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "key {name:?}"),
            None => f.write_str("no key"),
        }
    }
}
