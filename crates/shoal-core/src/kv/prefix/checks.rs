//! Whether the tree agrees with itself, counted anew.

use std::collections::HashMap;

use super::index::PrefixIndex;
use super::{NO_BLOCK, NO_NODE};

impl PrefixIndex {
    /// Says what is wrong with the tree, if anything is.
    ///
    /// # Errors
    /// A sentence that names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut held = vec![0_u32; self.groups.len()];
        for node in self.nodes.iter() {
            let found = self.nodes.at(node);
            let children = self.nodes.children(node).count();
            if found.resident == 0 && children == 0 {
                return Err(format!("node {node} holds nothing and leads nowhere"));
            }
            let mut resident = 0;
            for (group, held) in held.iter_mut().enumerate() {
                let block = self.nodes.block(node, group);
                if block == NO_BLOCK {
                    continue;
                }
                resident += 1;
                *held += 1;
                if self.node_of(group, block) != Some(node) {
                    return Err(format!("group {group}: node {node} has block {block}, which is elsewhere"));
                }
            }
            if resident != found.resident {
                return Err(format!("node {node} counts {} blocks, has {resident}", found.resident));
            }
            if found.parent == NO_NODE {
                let salt = self.salts.get(&node);
                let same = salt.and_then(|(kind, salt)| self.roots[*kind as usize].get(salt)) == Some(&node);
                if !same || found.depth != 0 || resident > 0 {
                    return Err(format!("root {node} is not the root of one salt (I12)"));
                }
                continue;
            }
            let above = self.nodes.at(found.parent);
            if !above.live || above.depth + 1 != found.depth || above.root != found.root {
                return Err(format!("node {node} does not hang on its parent {}", found.parent));
            }
            if self.nodes.children(found.parent).filter(|child| *child == node).count() != 1 {
                return Err(format!("node {node} is not once among its parent's children"));
            }
            if self.by_key.get(found.key, |node| self.nodes.at(node).key) != Some(node) {
                return Err(format!("node {node} is not found by its key"));
            }
        }
        let roots: usize = self.roots.iter().map(HashMap::len).sum();
        if roots != self.salts.len() || self.by_key.len() + roots != self.nodes.len() {
            return Err(format!(
                "{} keys and {roots} roots for {} nodes",
                self.by_key.len(),
                self.nodes.len()
            ));
        }
        for (group, (blocks, held)) in self.groups.iter().zip(held).enumerate() {
            let placed = blocks.nodes.iter().filter(|node| **node != NO_NODE).count();
            if placed != held as usize || blocks.sealed != held {
                return Err(format!(
                    "group {group} counts {} blocks, {placed} have nodes, nodes have {held}",
                    blocks.sealed
                ));
            }
        }
        Ok(())
    }
}
