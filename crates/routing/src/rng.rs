//! Counter-based randomness: Philox4x32-10 (Salmon et al. 2011), keyed by (seed, step, layer, purpose), counted by (token, expert).
//!
//! A draw depends on nothing but its key, so threads, ranks, batch splits and the order of evaluation cannot change it.
//! Evaluation has no stream at all: [`StepContext::stream`] returns `None` there, which is how "evaluation draws no
//! randomness" is enforced rather than promised.

/// Where in the run a layer is being routed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepContext {
    /// The run's seed.
    pub seed: u64,
    /// Optimizer step.
    pub step: u64,
    /// Layer index.
    pub layer: u32,
    /// Noise, random drops and capacity at its training value only when set.
    pub training: bool,
    /// Index of this batch's first token in the step's global batch; a rank that holds a slice draws as one process would.
    pub first_token: u64,
}

impl StepContext {
    /// Evaluation: no randomness, evaluation capacity.
    pub const fn evaluation() -> Self {
        Self { seed: 0, step: 0, layer: 0, training: false, first_token: 0 }
    }

    /// A training step of layer `layer`.
    pub const fn training(seed: u64, step: u64, layer: u32) -> Self {
        Self { seed, step, layer, training: true, first_token: 0 }
    }

    /// The stream for one purpose; `None` outside training.
    pub fn stream(&self, purpose: Purpose) -> Option<Stream> {
        self.training.then(|| Stream::new(self, purpose))
    }
}

/// What a draw is for; two purposes never share numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Noise added to logits.
    LogitNoise = 1,
    /// Multiplicative jitter of the router's input.
    InputJitter = 2,
    /// Whether a second choice is taken.
    SecondChoice = 3,
    /// Random token selection at a full expert.
    TokenSelection = 4,
    /// Gumbel noise for sampling an expert.
    Gumbel = 5,
    /// Shuffling tokens before an assignment.
    Shuffle = 6,
    /// Noise on Soft MoE logits.
    SlotNoise = 7,
    /// Permuting labels in a significance test.
    Permutation = 16,
}

/// A keyed stream of draws addressed by (token, expert).
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    key: [u32; 2],
    first_token: u64,
}

impl Stream {
    pub(crate) fn new(step: &StepContext, purpose: Purpose) -> Self {
        // The four words of (step, layer, purpose) under the seed's key give the stream's own key.
        let words =
            philox(words_of(step.seed), [step.step as u32, (step.step >> 32) as u32, step.layer, purpose as u32]);
        Self { key: [words[0], words[1]], first_token: step.first_token }
    }

    /// 128 random bits for (token, expert).
    pub fn bits(&self, token: usize, expert: usize) -> [u32; 4] {
        let token = words_of(self.first_token + token as u64);
        philox(self.key, [token[0], token[1], expert as u32, 0])
    }

    /// Uniform on the open interval (0, 1), 53 bits.
    pub fn uniform(&self, token: usize, expert: usize) -> f64 {
        let [a, b, ..] = self.bits(token, expert);
        open_unit(a, b)
    }

    /// Standard normal by Box and Muller.
    pub fn normal(&self, token: usize, expert: usize) -> f64 {
        let [a, b, c, d] = self.bits(token, expert);
        (-2.0 * open_unit(a, b).ln()).sqrt() * (std::f64::consts::TAU * open_unit(c, d)).cos()
    }

    /// Standard Gumbel, `-ln(-ln u)`.
    pub fn gumbel(&self, token: usize, expert: usize) -> f64 {
        -(-self.uniform(token, expert).ln()).ln()
    }
}

fn words_of(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn open_unit(a: u32, b: u32) -> f64 {
    let bits = ((u64::from(a) << 32) | u64::from(b)) >> 11;
    (bits as f64 + 0.5) / (1u64 << 53) as f64
}

/// Ten rounds of Philox4x32; constants from the paper, table 2.
fn philox(mut key: [u32; 2], mut ctr: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(ctr[0]) * 0xD251_1F53;
        let b = u64::from(ctr[2]) * 0xCD9E_8D57;
        ctr = [(b >> 32) as u32 ^ ctr[1] ^ key[0], b as u32, (a >> 32) as u32 ^ ctr[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    ctr
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn draws_have_the_right_moments_and_streams_differ() {
        let step = StepContext::training(7, 3, 1);
        let noise = step.stream(Purpose::LogitNoise).unwrap();
        let (mut sum, mut squares) = (0.0, 0.0);
        for i in 0..20_000 {
            let z = noise.normal(i / 8, i % 8);
            sum += z;
            squares += z * z;
        }
        assert!((sum / 20_000.0).abs() < 0.03 && (squares / 20_000.0 - 1.0).abs() < 0.04);
        let other = step.stream(Purpose::Gumbel).unwrap();
        assert_ne!(noise.bits(0, 0), other.bits(0, 0));
        assert!(StepContext::evaluation().stream(Purpose::Gumbel).is_none());
    }

    #[test]
    fn a_rank_that_holds_a_slice_draws_what_one_process_would() {
        let whole = StepContext::training(1, 2, 0);
        let slice = StepContext { first_token: 10, ..whole };
        let purpose = Purpose::TokenSelection;
        assert_eq!(whole.stream(purpose).unwrap().bits(13, 2), slice.stream(purpose).unwrap().bits(3, 2));
    }
}
