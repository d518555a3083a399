//! Where a run stopped being a number: the step, what was seen first, and which tensor holds it.

/// What was found when the loss or the gradient norm was infinite or not a number.
#[derive(Debug, Clone, PartialEq)]
pub struct NonFinite {
    /// The step that was not applied.
    pub step: u64,
    /// "loss" or "gradient norm".
    pub quantity: &'static str,
    /// Its value.
    pub value: f64,
    /// The first tensor with such values: parameters are looked at first, then router logits, then gradients, each in the model's order.
    pub culprit: Option<Culprit>,
    /// The learning rate of that step; the one to lower first.
    pub lr: f64,
}

/// A tensor with values that are not numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Culprit {
    /// "parameter", "logits of" or "gradient of".
    pub role: &'static str,
    /// The tensor's dotted name, which holds its layer.
    pub tensor: String,
    /// Values that are infinite or not a number.
    pub bad: usize,
    /// Values in all.
    pub len: usize,
}

impl std::fmt::Display for NonFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "step {}: the {} is {}", self.step, self.quantity, self.value)?;
        match &self.culprit {
            Some(c) => write!(f, "; first seen in {} `{}` ({} of {} values)", c.role, c.tensor, c.bad, c.len)?,
            None => write!(f, "; every parameter, router score and gradient is finite, so it overflowed in the loss")?,
        }
        write!(
            f,
            ". The weights of the step before were kept; the learning rate was {:.3e} (optimizer.lr), and clipping \
             is optimizer.clip",
            self.lr
        )
    }
}

/// The first of `tensors` (role, name, values) that holds a value that is not finite.
pub fn first_non_finite<'a>(tensors: impl IntoIterator<Item = (&'static str, String, &'a [f32])>) -> Option<Culprit> {
    tensors.into_iter().find_map(|(role, tensor, values)| {
        let bad = values.iter().filter(|v| !v.is_finite()).count();
        (bad > 0).then_some(Culprit { role, tensor, bad, len: values.len() })
    })
}
