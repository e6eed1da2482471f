"""Every field of a configuration, with its default. The other files here start from this one and change a few.

Any field can be set on the command line: `--config.inner.learning_rate=0.03`, `--config.model.hidden_sizes="(100,)"`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default configuration, locked: a key that is not here cannot be set."""
    config = ConfigDict(type_safe=True)

    # What `experiments.train` trains: "task_loss" (the baseline), "tuned_task_loss" (the baseline at the best of
    # `tuning.learning_rates`), "ml3" (loss learned offline, then frozen) or "adalfl" (loss learned online). And what
    # else can be made of a clean set, with outer.split "valid": "fine_tuned" (the baseline, then the outer split alone)
    # or "reweighting" (Learning to Reweight: weights of examples, afresh at every step).
    config.method = "adalfl"
    # What `experiments.compare` compares, seed for seed.
    config.methods = ("task_loss", "tuned_task_loss", "ml3", "adalfl")
    # The first seed, and how many seeds: every seed is one model, and all of them train in one program.
    config.seed = 0
    config.num_seeds = 10

    config.dataset = ConfigDict()
    # "digits", "diabetes" (both ship with scikit-learn), "pydoc_topics" (text that ships with Python), "california",
    # "crime" (downloaded once), the path of an .npz file with `inputs` and `targets`, one of
    # `adalfl_jax.data.register_dataset`, or an image classification of TensorFlow Datasets ("mnist", "fashion_mnist",
    # "cifar10", "cifar100", "svhn_cropped", ...) once `python -m adalfl_jax.data.prepare` has prepared it.
    config.dataset.name = "digits"
    # Where datasets were prepared; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets.
    config.dataset.data_dir = ""
    # Where decoded images and downloaded tables are kept; "" is beside the data.
    config.dataset.cache_dir = ""
    # Height and width that images of TensorFlow Datasets are scaled and cropped to; 0 leaves them as they are.
    config.dataset.image_size = 0
    # Share of the training examples that become the validation split, where the data bring none.
    config.dataset.valid_fraction = 0.1
    # Number of those examples; 0 goes by the share. With `outer.split` "valid" it is the size of the clean set.
    config.dataset.valid_examples = 0
    # Largest over smallest class of the training split, whose classes then fall exponentially in size from the first
    # to the last; 1 leaves them as they are. The validation and the test split keep theirs.
    config.dataset.imbalance = 1.0
    # Share of the training split's labels that are wrong, in [0, 1); those of the other splits stay right.
    config.dataset.label_noise = 0.0
    # What they become: "symmetric" (any other class, each as likely) or "pair" (class c + 1; the last, class 0); or
    # "removed" (the examples are left out: how far knowing which labels are wrong would lead).
    config.dataset.noise_kind = "symmetric"
    # Seed of the examples that are drawn, for splits and for wrong labels; all of `config.seed`'s models share them.
    config.dataset.seed = 0
    # "never" keeps all examples on the device, "always" on the host, from where batches are streamed; "auto" streams
    # what would fill more than a quarter of the device.
    config.dataset.streaming = "auto"

    # What is done to images of training batches, inside the step.
    config.augmentation = ConfigDict()
    # Zeros put around an image before a window of its size is cut out anywhere; 0 does not crop.
    config.augmentation.padding = 0
    # Whether images are mirrored left to right, each with even odds; refused for characters.
    config.augmentation.flip = False

    config.model = ConfigDict()
    # "logistic", "mlp", "lenet5", "vgg16", "allcnnc", "squeezenet", "resnet", "wide_resnet", or one of
    # `adalfl_jax.models.register_model`, which gets those of the fields below and of the options that it names.
    config.model.name = "mlp"
    # Units of each hidden layer of the "mlp"; other models ignore it.
    config.model.hidden_sizes = (512, 512)
    # Layers of a "resnet" (18, 34 or 50) or "wide_resnet" (16, 22, 28, 40, ...); other models ignore it.
    config.model.depth = 18
    # How many times as many channels as usual a "wide_resnet" has; other models ignore it.
    config.model.width = 1
    # "he_glorot", the literature's (He before ReLU, Glorot before tanh and at the output), or "pytorch", whose default
    # is uniform in +-1/sqrt(fan_in), a sixth of He's variance.
    config.model.initialization = "he_glorot"
    # What the model computes in: "float32" or "bfloat16"; parameters, statistics and losses are float32 in both.
    config.model.compute_dtype = "float32"
    # Whether the backward pass computes each block anew to save memory; for the models that have blocks.
    config.model.remat = False
    # Options of the model that have no field here, by name: the dropout_rate of "allcnnc", and those of registered
    # models. A file sets them, `config.model.options.dropout_rate = 0.5`; the command line may then change them.
    config.model.options = ConfigDict()

    # The task loss L: "softmax_cross_entropy", "sigmoid_cross_entropy", "squared_error", "absolute_error", "huber"; for
    # wrong labels "smoothed_cross_entropy" (0.1), "generalized_cross_entropy" (q = 0.7), "symmetric_cross_entropy".
    config.task_loss = "softmax_cross_entropy"
    # What is reported, lower is better: "error_rate", "top_5_error_rate", "mean_squared_error", "mean_absolute_error";
    # for text "bits_per_character".
    config.metric = "error_rate"
    # Examples in an inner and in an outer batch, at most the smaller of the splits they are drawn from.
    config.batch_size = 100
    # Training steps of theta.
    config.num_steps = 1000
    # Steps between evaluations: a chunk, which runs on the device in one piece unless data are streamed. Progress is
    # shown after each.
    config.eval_every = 50

    # The optimiser of theta, plain SGD unless told otherwise.
    config.inner = ConfigDict()
    # alpha.
    config.inner.learning_rate = 0.01
    # Length of the first step on a learned loss: after the offline phase alpha is scaled, for each seed, so that this
    # step is as long as one on the task loss at this learning rate, leaving out momentum and weight decay; weight decay
    # keeps using alpha. 0 leaves alpha as it is. docs/noisy_labels.md has what suited which data.
    config.inner.first_step_rate = 0.0
    # In [0, 1); 0 is none.
    config.inner.momentum = 0.0
    # Nesterov's form of momentum.
    config.inner.nesterov = False
    # Added to the gradient before momentum, as in the paper's setting: decay * theta.
    config.inner.weight_decay = 0.0
    # Largest global norm of the gradient; 0 does not clip.
    config.inner.clip_norm = 0.0
    # Of the learning rate over `num_steps`: "constant", "linear" or "cosine" (both down to 0), or "milestones".
    config.inner.schedule = "constant"
    # Steps of training at which "milestones" multiplies the learning rate by the factor.
    config.inner.milestones = ()
    # In (0, 1].
    config.inner.milestone_factor = 0.1

    # The optimiser of phi while theta trains: Adam with a fresh state.
    config.outer = ConfigDict()
    # eta. The paper's is 1e-5.
    config.outer.learning_rate = 3e-4
    # Of eta: "constant", "linear" or "cosine", which fall towards 0 over the updates of phi, as alpha does over steps.
    config.outer.schedule = "constant"
    # Where outer batches come from: "train" (a second training batch) or "valid".
    config.outer.split = "train"
    # Share of the validation split that outer batches come from; the rest alone then gives the validation metric. An
    # error on examples that were trained on says nothing: to tune what trains on the validation split, hold half of it
    # out.
    config.outer.split_fraction = 1.0
    # n, to update phi at every n-th step only; the steps between cost no more than training on a fixed loss.
    config.outer.every = 1
    # Share of the inner batch on which the gradient of phi is estimated; theta is updated on the whole. Unbiased
    # without batch norm; with it, 1.0 keeps the statistics of the whole inner batch. learned_loss.floor and ceiling are
    # of the whole batch and need 1.0.
    config.outer.inner_fraction = 1.0
    # The same of the outer batch. With 0.25 for both, a step costs about 1.5 times a step of plain training for a
    # ResNet-18 and 1.7 times for an MLP.
    config.outer.outer_fraction = 1.0
    # Whether the outer batch of a step is the inner batch of the next, whose forward pass then serves both losses.
    config.outer.pipelined = False
    # Share of the steps, the last ones, in which theta trains on a clean set too, with outer.split "valid": on the sum
    # of its loss of the inner batch and the task loss of the outer one. They pass the model together, so batch norm
    # takes the statistics of both. phi stays as it is from there. 1 begins with the first step, not for "adalfl".
    # "fine_tuned" and "reweighting" leave this out.
    config.outer.joint_share = 0.0

    # Algorithm 1: phi learned on fresh models before the real one is trained. Outer batches come from `outer.split`.
    config.offline = ConfigDict()
    # S_init; 0 leaves phi as drawn.
    config.offline.num_steps = 2500
    # S_inner; above 1 an estimator that takes one step alone gives way to "unrolled" in this phase.
    config.offline.num_inner_steps = 1
    # Of Adam in this phase.
    config.offline.learning_rate = 1e-3

    # M_phi.
    config.learned_loss = ConfigDict()
    # "network" (the paper's), "scaled_task_loss" (a learned learning rate), "weight_network" (Meta-Weight-Net:
    # cross-entropy with a learned weight for each example), or the name of a class of
    # `adalfl_jax.register_learned_loss`, which gets the fields of the network and the options that it names, and
    # `task_loss`.
    config.learned_loss.family = "network"

    # Of the "network":
    # Units of each hidden layer.
    config.learned_loss.hidden_sizes = (40, 40)
    # Of the hidden layers: "smooth_leaky_relu" or a function of jax.nn, for example "relu", "tanh", "softplus", "gelu".
    config.learned_loss.activation = "smooth_leaky_relu"
    # Sharpness of the smooth leaky ReLU.
    config.learned_loss.beta = 10.0
    # Its slope towards minus infinity.
    config.learned_loss.gamma = 0.01
    # Of the last layer, the same names. The authors' code has "softplus", which now and then goes flat and stays so.
    config.learned_loss.output_activation = "identity"
    # Whether layers have biases.
    config.learned_loss.use_bias = False
    # Over the outputs of an example: "sum", or "mean" (the paper's 1/C), which divides the learning rate by C.
    config.learned_loss.reduction = "sum"
    # What the network sees of the outputs: "probabilities", "log_probabilities", "sigmoid" (of each output) or "raw"
    # (for a regression).
    config.learned_loss.predictions = "probabilities"
    # Whether it also sees how far training is, t / num_steps; 0 in the offline phase, whose models are fresh.
    config.learned_loss.use_progress = False
    # Of the "weight_network": units of its hidden layer.
    config.learned_loss.weight_hidden_size = 100

    # Of any family: where phi starts. "random", "task_loss" (fitted to the task loss's gradients, so training begins as
    # usual), the name of another loss to fit to ("symmetric_cross_entropy", say, for wrong labels), or the path of
    # losses learned before: the workdir of a finished run, from which every seed takes its own, or one saved loss for
    # all seeds. The offline phase goes on from there; offline.num_steps = 0 leaves it out.
    config.learned_loss.start = "random"
    # Least length of the gradient of M_phi by the outputs, in lengths of that of the task loss; 0 sets no bound. With
    # floor and ceiling 1 phi learns a shape only, and the learning rate means what it means for the task loss.
    config.learned_loss.floor = 0.0
    # Largest length, in the same unit; 0 sets no bound.
    config.learned_loss.ceiling = 0.0
    # Fields of registered classes that have none here, by name, as with `model.options`.
    config.learned_loss.options = ConfigDict()

    # How d L / d phi is computed; docs/meta_gradients.md compares them. Exact through one step: "forward", "recompute"
    # (least memory), "unrolled", "checkpointed", "mixed_mode" (these three through offline.num_inner_steps too). Nearly
    # exact: "finite_difference", cheaper for convolutional networks, and for smooth models "central_difference". Longer
    # horizons: "truncated". As if theta minimised M_phi: "neumann", "conjugate_gradient". Without derivatives:
    # "evolution_strategies", "persistent_evolution_strategies".
    config.hypergradient = "forward"
    config.estimator = ConfigDict()
    # Steps "truncated" goes back through.
    config.estimator.window = 5
    # Terms of "neumann"; products with the Hessian, at most, of "conjugate_gradient".
    config.estimator.num_iterations = 10
    # Learning rate of the descent that "neumann" is; below 2 / (largest eigenvalue of the Hessian + the damping).
    config.estimator.step_size = 0.1
    # Added to the Hessian's eigenvalues by "neumann" and "conjugate_gradient".
    config.estimator.damping = 0.01
    # Antithetic pairs of both evolution strategies.
    config.estimator.num_pairs = 8
    # Standard deviation of phi's displacements in them.
    config.estimator.sigma = 0.01
    # Steps between restarts of the "persistent_evolution_strategies".
    config.estimator.horizon = 100

    config.baseline = ConfigDict()
    # What methods that learn no loss train on; "" is the task loss. With wrong labels, for example, a robust one:
    # "generalized_cross_entropy", "symmetric_cross_entropy" or "smoothed_cross_entropy". Outer batches always get the
    # task loss.
    config.baseline.loss = ""
    # Share of the steps, the last ones, in which "fine_tuned" trains on outer batches.
    config.baseline.fine_tuning = 0.2

    # The learning rates "tuned_task_loss" trains at; it keeps the one with the best mean validation metric.
    config.tuning = ConfigDict()
    config.tuning.learning_rates = (0.01, 0.03, 0.1, 0.3, 1.0)

    # What happens at a number that is not finite: "stop" ends the run and keeps the last finite state, "skip" leaves
    # that step out for that seed alone and counts it in `train/skipped_steps`, "back_off" takes the chunk again with
    # eta halved, where phi is learned.
    config.on_nonfinite = "stop"

    # All that follows has no effect on what a run computes, but for rounding, and may change whenever the same command
    # resumes it.

    # What is kept of a run that is not over, for the same command to resume from.
    config.checkpoint = ConfigDict()
    # Seconds from one checkpoint to the next, which comes at the end of a chunk of `eval_every` steps and is written
    # while training goes on; 0 does not go by time.
    config.checkpoint.every_seconds = 300.0
    # Steps from one to the next, which comes at the end of a chunk; 0 does not go by steps.
    config.checkpoint.every_steps = 0
    # The newest ones that stay, of each stage of the run (docs/workdir.md); 0 writes none.
    config.checkpoint.keep = 2

    # Pictures of the first seed's learned loss that each stage of a run adds to TensorBoard, evenly over its steps.
    config.num_loss_figures = 10
    # The first and the last of the steps to profile, counted from 1 in each stage of a run, as in (1001, 1100): every
    # chunk of `eval_every` steps that has a step of this range is traced into `profiles/` of the workdir. () traces
    # nothing.
    config.profile_steps = ()
    # Project of Weights & Biases that measures and pictures also go to; "" sends nothing. Needs the extra [wandb].
    config.wandb_project = ""
    # The devices a run is divided over, as many as the product of the three; docs/pods.md says which to choose. One of
    # them may be 0, for all devices that are left. Results are the same but for rounding.
    config.mesh = ConfigDict()
    # Parts the seeds are divided into; it must divide num_seeds.
    config.mesh.seed = 1
    # Parts every batch is divided into; it must divide batch_size.
    config.mesh.data = 1
    # Parts that large arrays of theta, of phi and of their optimisers' states are divided into.
    config.mesh.model = 1

    # The processes of a run on several hosts; docs/pods.md has the commands.
    config.hosts = ConfigDict()
    # "" for a single process; "auto" for the processes that SLURM, Open MPI, a Cloud TPU or Kubernetes tells of, and a
    # single one where there are none of these; or the ADDRESS:PORT of the first process.
    config.hosts.connect = ""
    # How many there are, with an address; 0 goes by the environment.
    config.hosts.num_processes = 0
    # Which one this is, from 0, with an address; -1 goes by the environment.
    config.hosts.process_id = -1
    # Seconds of silence of one process after which the others end.
    config.hosts.timeout_seconds = 30

    config.lock()
    config.model.options.unlock()  # for files that start from this one; the command line adds none
    config.learned_loss.options.unlock()
    return config
