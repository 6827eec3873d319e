//! Lists of numbers threaded through one array: a number is in at most one list, and leaves it in O(1).

/// The end of a list.
pub(super) const NONE: u32 = u32::MAX;

/// The links of all numbers.
#[derive(Clone, Debug)]
pub(super) struct Links {
    /// (previous, next) of each number.
    links: Vec<(u32, u32)>,
}

/// One list.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    pub(super) head: u32,
    pub(super) tail: u32,
    pub(super) len: u32,
}

impl List {
    pub(super) const EMPTY: Self = Self { head: NONE, tail: NONE, len: 0 };

    pub(super) fn first(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }
}

impl Links {
    pub(super) fn new(numbers: u32) -> Self {
        Self { links: vec![(NONE, NONE); numbers as usize] }
    }

    /// Makes room for `number`.
    pub(super) fn reach(&mut self, number: u32) {
        if self.links.len() <= number as usize {
            self.links.resize(number as usize + 1, (NONE, NONE));
        }
    }

    pub(super) fn push_back(&mut self, list: &mut List, number: u32) {
        self.links[number as usize] = (list.tail, NONE);
        if list.tail == NONE {
            list.head = number;
        } else {
            self.links[list.tail as usize].1 = number;
        }
        list.tail = number;
        list.len += 1;
    }

    pub(super) fn push_front(&mut self, list: &mut List, number: u32) {
        self.links[number as usize] = (NONE, list.head);
        if list.head == NONE {
            list.tail = number;
        } else {
            self.links[list.head as usize].0 = number;
        }
        list.head = number;
        list.len += 1;
    }

    pub(super) fn remove(&mut self, list: &mut List, number: u32) {
        let (previous, next) = std::mem::replace(&mut self.links[number as usize], (NONE, NONE));
        if previous == NONE {
            list.head = next;
        } else {
            self.links[previous as usize].1 = next;
        }
        if next == NONE {
            list.tail = previous;
        } else {
            self.links[next as usize].0 = previous;
        }
        list.len -= 1;
    }

    /// Puts `to`, which is in no list, where `from` is.
    pub(super) fn replace(&mut self, list: &mut List, from: u32, to: u32) {
        let (previous, next) = std::mem::replace(&mut self.links[from as usize], (NONE, NONE));
        self.links[to as usize] = (previous, next);
        if previous == NONE {
            list.head = to;
        } else {
            self.links[previous as usize].1 = to;
        }
        if next == NONE {
            list.tail = to;
        } else {
            self.links[next as usize].0 = to;
        }
    }

    pub(super) fn iter(&self, list: &List) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(list.first(), |number| {
            let next = self.links[*number as usize].1;
            (next != NONE).then_some(next)
        })
    }
}
