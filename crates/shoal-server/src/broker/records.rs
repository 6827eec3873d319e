//! The models' records, and which of them something has happened to.
//!
//! After each change [`super::Core::settle`] brings everything in line. To look at every model for that would make each
//! message of one worker as slow as the shelf is long. So whoever may change a record marks it, by taking it as mutable:
//! the marked ones are looked at again, and walks go over the *lively* ones, those that are marked or do not rest. Apart,
//! so that there is no other way to change a record; the tests' histories compare what is left out with a look at all.

use std::collections::BTreeSet;
use std::ops::{Deref, Index, IndexMut};

use super::record::Record;

/// See the module's text. Reads as a slice.
#[derive(Debug, Default)]
pub(crate) struct Records {
    all: Vec<Record>,
    /// Not looked at since they were last taken as mutable.
    marked: BTreeSet<usize>,
    /// Found not to rest when they were last looked at.
    active: BTreeSet<usize>,
}

impl FromIterator<Record> for Records {
    fn from_iter<T: IntoIterator<Item = Record>>(records: T) -> Self {
        let mut all = Self { all: records.into_iter().collect(), ..Self::default() };
        all.mark_all();
        all
    }
}

impl Records {
    /// One more.
    pub(crate) fn push(&mut self, record: Record) {
        self.marked.insert(self.all.len());
        self.all.push(record);
    }

    /// Something has happened to this one that its record does not show.
    pub(crate) fn mark(&mut self, place: usize) {
        if place < self.all.len() {
            self.marked.insert(place);
        }
    }

    /// Any of them may have changed.
    pub(crate) fn mark_all(&mut self) {
        self.marked = (0..self.all.len()).collect();
    }

    /// Those that are marked, which they are no more.
    pub(crate) fn take_marked(&mut self) -> BTreeSet<usize> {
        std::mem::take(&mut self.marked)
    }

    /// Those that are marked.
    pub(crate) const fn marked(&self) -> &BTreeSet<usize> {
        &self.marked
    }

    /// What was found when one was looked at.
    pub(crate) fn set_active(&mut self, place: usize, is_active: bool) {
        if is_active {
            self.active.insert(place);
        } else {
            self.active.remove(&place);
        }
    }

    /// Places of all that may do anything or have anything done to them, in order. All others rest.
    pub(crate) fn lively_places(&self) -> impl Iterator<Item = usize> + '_ {
        self.active.union(&self.marked).copied()
    }

    /// The records of [`lively_places`](Self::lively_places).
    pub(crate) fn lively(&self) -> impl Iterator<Item = &Record> {
        self.lively_places().map(|place| &self.all[place])
    }

    /// One to note something in that nothing follows from.
    pub(crate) fn quietly(&mut self, place: usize) -> &mut Record {
        &mut self.all[place]
    }

    /// All of them, as [`quietly`](Self::quietly).
    pub(crate) fn all_quietly(&mut self) -> impl Iterator<Item = &mut Record> {
        self.all.iter_mut()
    }

    /// All of them, marked.
    pub(crate) fn iter_mut(&mut self) -> std::slice::IterMut<'_, Record> {
        self.mark_all();
        self.all.iter_mut()
    }
}

impl Deref for Records {
    type Target = [Record];

    fn deref(&self) -> &Self::Target {
        &self.all
    }
}

impl Index<usize> for Records {
    type Output = Record;

    fn index(&self, place: usize) -> &Record {
        &self.all[place]
    }
}

impl IndexMut<usize> for Records {
    fn index_mut(&mut self, place: usize) -> &mut Record {
        self.marked.insert(place);
        &mut self.all[place]
    }
}

impl<'a> IntoIterator for &'a Records {
    type Item = &'a Record;
    type IntoIter = std::slice::Iter<'a, Record>;

    fn into_iter(self) -> Self::IntoIter {
        self.all.iter()
    }
}

impl<'a> IntoIterator for &'a mut Records {
    type Item = &'a mut Record;
    type IntoIter = std::slice::IterMut<'a, Record>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}
