//! Which rows each expert computes: the discrete result of routing.
//!
//! [`Choices`] is what tokens asked for, in token order. [`Assignment`] is what they got, sorted by (expert, token) by one
//! counting sort: O(T k + E), no hashing, and stable, so equal experts keep token order.

use crate::error::RoutingError;

/// Slot of a dropped pair.
pub const NO_SLOT: u32 = u32::MAX;

/// Selected experts before capacity: pairs in order (token, choice).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choices {
    /// Token t's pairs are `token_offsets[t]..token_offsets[t + 1]`; `[T + 1]`.
    pub token_offsets: Vec<u32>,
    /// Expert of each pair, best first within a token.
    pub experts: Vec<u32>,
}

impl Choices {
    /// Every token with exactly `k` choices, `experts_tk` row-major.
    pub fn rectangular(tokens: usize, k: usize, experts_tk: Vec<u32>) -> Self {
        debug_assert_eq!(experts_tk.len(), tokens * k);
        Self { token_offsets: (0..=tokens).map(|t| (t * k) as u32).collect(), experts: experts_tk }
    }

    /// From one list per token.
    pub fn ragged<I: AsRef<[u32]>>(per_token: impl IntoIterator<Item = I>) -> Self {
        let mut choices = Self { token_offsets: vec![0], experts: Vec::new() };
        for list in per_token {
            choices.experts.extend_from_slice(list.as_ref());
            choices.token_offsets.push(choices.experts.len() as u32);
        }
        choices
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.token_offsets.len().saturating_sub(1)
    }

    /// Pairs.
    pub fn pairs(&self) -> usize {
        self.experts.len()
    }

    /// Experts of token `t`, best first.
    pub fn of_token(&self, t: usize) -> &[u32] {
        &self.experts[self.pair_range(t)]
    }

    /// Pair indices of token `t`.
    pub fn pair_range(&self, t: usize) -> std::ops::Range<usize> {
        self.token_offsets[t] as usize..self.token_offsets[t + 1] as usize
    }

    /// Longest list.
    pub fn most_per_token(&self) -> usize {
        (0..self.tokens()).map(|t| self.of_token(t).len()).max().unwrap_or(0)
    }

    /// Checks choices that come from elsewhere: offsets that start at 0, never fall and end at the number of pairs; experts
    /// below `experts`, none twice in a token's list.
    pub fn check(&self, experts: usize) -> Result<(), RoutingError> {
        let rising = self.token_offsets.windows(2).all(|w| w[0] <= w[1]);
        let (first, last) = (self.token_offsets.first().copied(), self.token_offsets.last().copied());
        if first != Some(0) || !rising || last != Some(self.pairs() as u32) {
            return Err(RoutingError::Config {
                key: "choices.token_offsets",
                value: format!("{:?}", (first, last)),
                reason: format!("offsets that rise from 0 to {}, the number of pairs", self.pairs()),
            });
        }
        if let Some(&bad) = self.experts.iter().find(|e| **e as usize >= experts) {
            return Err(RoutingError::NoSuchExpert { expert: bad, experts });
        }
        for token in 0..self.tokens() {
            let list = self.of_token(token);
            if let Some((_, &expert)) = list.iter().enumerate().find(|(j, e)| list[..*j].contains(e)) {
                return Err(RoutingError::RepeatedExpert { token, expert });
            }
        }
        Ok(())
    }

    /// Selections per expert.
    pub fn demand(&self, experts: usize) -> Vec<u32> {
        let mut demand = vec![0; experts];
        for &e in &self.experts {
            demand[e as usize] += 1;
        }
        demand
    }
}

/// A selection that got no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DroppedPair {
    /// Token.
    pub token: u32,
    /// Which of its choices.
    pub choice: u32,
    /// The expert that was full.
    pub expert: u32,
}

/// Rows sorted by (expert, token), and the way back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assignment {
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// Expert e's rows are `row_offsets[e]..row_offsets[e + 1]`; `[E + 1]`.
    pub row_offsets: Vec<u32>,
    /// Token of each row; `[N]`.
    pub token_of_row: Vec<u32>,
    /// Which of the token's choices the row is; `[N]`.
    pub choice_of_row: Vec<u32>,
    /// Token t's kept choices are `row_of_choice[token_offsets[t]..token_offsets[t + 1]]`; `[T + 1]`.
    pub token_offsets: Vec<u32>,
    /// Row of each kept choice, tokens in order, choices in order; `[N]`.
    pub row_of_choice: Vec<u32>,
    /// What did not fit, in order (token, choice).
    pub dropped: Vec<DroppedPair>,
    /// Selections per expert before capacity; `[E]`.
    pub demand: Vec<u32>,
}

impl Assignment {
    /// Keeps every choice.
    pub fn dropless(choices: &Choices, experts: usize) -> Self {
        Self::build(choices, experts, |_| true)
    }

    /// Keeps the pairs whose slot is not [`NO_SLOT`].
    pub fn with_slots(choices: &Choices, experts: usize, slots: &[u32]) -> Self {
        Self::build(choices, experts, |pair| slots[pair] != NO_SLOT)
    }

    /// Keeps the pairs for which `keep` says so.
    pub fn build(choices: &Choices, experts: usize, keep: impl Fn(usize) -> bool) -> Self {
        let tokens = choices.tokens();
        let mut demand = vec![0u32; experts];
        let mut kept = vec![0u32; experts];
        for (pair, &e) in choices.experts.iter().enumerate() {
            demand[e as usize] += 1;
            kept[e as usize] += u32::from(keep(pair));
        }
        let mut row_offsets = Vec::with_capacity(experts + 1);
        let mut rows = 0;
        for &count in &kept {
            row_offsets.push(rows);
            rows += count;
        }
        row_offsets.push(rows);
        let mut next = row_offsets[..experts].to_vec();
        let mut token_of_row = vec![0; rows as usize];
        let mut choice_of_row = vec![0; rows as usize];
        let mut row_of_choice = Vec::with_capacity(rows as usize);
        let mut token_offsets = Vec::with_capacity(tokens + 1);
        let mut dropped = Vec::new();
        token_offsets.push(0);
        for token in 0..tokens {
            let first = choices.token_offsets[token] as usize;
            for (choice, &expert) in choices.of_token(token).iter().enumerate() {
                if keep(first + choice) {
                    let row = next[expert as usize];
                    next[expert as usize] += 1;
                    token_of_row[row as usize] = token as u32;
                    choice_of_row[row as usize] = choice as u32;
                    row_of_choice.push(row);
                } else {
                    dropped.push(DroppedPair { token: token as u32, choice: choice as u32, expert });
                }
            }
            token_offsets.push(row_of_choice.len() as u32);
        }
        Self {
            tokens,
            experts,
            row_offsets,
            token_of_row,
            choice_of_row,
            token_offsets,
            row_of_choice,
            dropped,
            demand,
        }
    }

    /// N, the rows all experts together compute.
    pub fn rows(&self) -> usize {
        self.token_of_row.len()
    }

    /// Rows of expert `e`.
    pub fn rows_of_expert(&self, e: usize) -> std::ops::Range<usize> {
        self.row_offsets[e] as usize..self.row_offsets[e + 1] as usize
    }

    /// Rows of token `t`, in choice order.
    pub fn rows_of_token(&self, t: usize) -> &[u32] {
        &self.row_of_choice[self.token_offsets[t] as usize..self.token_offsets[t + 1] as usize]
    }

    /// Expert of each row; `[N]`.
    pub fn expert_of_row(&self) -> Vec<u32> {
        let mut experts = Vec::with_capacity(self.rows());
        for e in 0..self.experts {
            experts.resize(self.row_offsets[e + 1] as usize, e as u32);
        }
        experts
    }

    /// Kept rows per expert; `[E]`.
    pub fn load(&self) -> Vec<u32> {
        self.row_offsets.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// Checks every promise of this type; for tests and for assignments that come from elsewhere.
    pub fn check(&self) -> Result<(), RoutingError> {
        let rows = self.rows();
        let length = |what: &'static str, expected: usize, found: usize| {
            let shape = format!("T={} E={} N={rows}", self.tokens, self.experts);
            if expected == found { Ok(()) } else { Err(RoutingError::Length { what, expected, found, shape }) }
        };
        length("row_offsets", self.experts + 1, self.row_offsets.len())?;
        length("token_offsets", self.tokens + 1, self.token_offsets.len())?;
        length("choice_of_row", rows, self.choice_of_row.len())?;
        length("row_of_choice", rows, self.row_of_choice.len())?;
        length("demand", self.experts, self.demand.len())?;
        length("row_offsets[E]", rows, self.row_offsets[self.experts] as usize)?;
        length("token_offsets[T]", rows, self.token_offsets[self.tokens] as usize)?;
        let monotone = |offsets: &[u32]| offsets.windows(2).all(|w| w[0] <= w[1]);
        let ordered = monotone(&self.row_offsets)
            && monotone(&self.token_offsets)
            && (0..self.experts).all(|e| self.token_of_row[self.rows_of_expert(e)].windows(2).all(|w| w[0] < w[1]))
            && self.row_of_choice.iter().all(|&row| (row as usize) < rows)
            && (0..self.tokens)
                .all(|t| self.rows_of_token(t).iter().all(|&r| self.token_of_row[r as usize] == t as u32));
        let selected: u64 = self.demand.iter().map(|&d| u64::from(d)).sum();
        length("kept + dropped pairs", selected as usize, rows + self.dropped.len())?;
        if ordered {
            Ok(())
        } else {
            Err(RoutingError::Config {
                key: "assignment",
                value: format!("{rows} rows"),
                reason: "rows sorted by (expert, token) that point back to their tokens".to_string(),
            })
        }
    }
}
